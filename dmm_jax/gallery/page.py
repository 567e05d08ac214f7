"""A static web page: its frame and typography, light and dark."""

import html

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1c1b19; --soft: #66625a; --line: #e3dfd6;
  --accent: #0b6e6e; --wash: #eef5f3; }
@media (prefers-color-scheme: dark) { :root { --paper: #151617; --card: #1d1f20; --ink: #e9e6df; --soft: #9f9a90;
  --line: #34363a; --accent: #63c3bd; --wash: #1b2a2a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 ui-sans-serif, system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 72rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1, h2 { font-family: ui-serif, Charter, "Iowan Old Style", Georgia, "Times New Roman", serif; line-height: 1.2;
  font-weight: 600; text-wrap: balance; letter-spacing: -0.01em; }
h1 { font-size: 2.35rem; margin: 0 0 .6rem; } h2 { font-size: 1.5rem; margin: 3.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; margin: 0 0 1rem; } .lead { font-size: 1.15rem; } .soft, figcaption { color: var(--soft); }
a { color: var(--accent); }
code, pre { font: .84em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--wash); border-radius: 6px; padding: .7rem .9rem;
  margin: .6rem 0; text-align: left; }
figure { margin: 1.2rem 0; } figcaption { font-size: .88rem; max-width: 44rem; margin-top: .5rem; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
summary { cursor: pointer; color: var(--soft); font-size: .84rem; }
"""


def escape(text: object) -> str:
    """Returns `text` escaped for HTML, quotes included."""
    return html.escape(str(text), quote=True)


def render(title: str, body: str, style: str = "") -> str:
    """Returns a complete HTML page with a plain-text title, an HTML body and extra CSS."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
