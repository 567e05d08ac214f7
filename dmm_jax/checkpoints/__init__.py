"""Checkpoints: opened, inspected, averaged, exported; and the training states of a run.

The files of this folder:

    checkpoint        Checkpoint: the configs and memory-mapped tensors of an opened checkpoint
    open              open_checkpoint, open_teacher: any path becomes a Checkpoint
    open_single_file  the part of `open` for single files
    naming            the rule between our parameters and PyTorch's state dicts
    architecture      the families of Stable Diffusion and their defaults
    abstract          networks without values: structure and shapes
    published         the published configs, without files
    compare           what prevents a merge
    inspect           the report on checkpoints; inspect_text renders it
    average           average: reads checkpoints, writes their average; merge_methods holds the arithmetic
    styles            choosing styles of a merged checkpoint, and folding a mix in
    write             writes one checkpoint in each format
    export            export: a training run's student in several formats, with model cards
    model_card        the text of a card
    modelspec         the metadata of a file
    provenance        the parents of a run, by name and hash
    licenses          the licences that checkpoints state
    states            saves and restores training states; checksums guards their arrays
    formats/          one file per format
"""
