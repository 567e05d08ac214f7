"""One operation per file: the paper's formula as `reference`, the fast form, and the rule that chooses.

Speed-ups were measured on one NVIDIA H200 in bfloat16 unless a comment says otherwise (docs/performance.md).
"""
