"""The report as one HTML page that needs no other file: plots are inside it, HTML in model output is shown, not run."""

import base64
import re
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap; }
pre { background: #8882; padding: .7rem; overflow-x: auto; }
img { max-width: 100%; background: white; }
"""


def report_page(markdown: str, folder: Path) -> str:
    """HTML of a report.

    Args:
        markdown: the report; its images are PNG files under `folder`.
        folder: the run's folder.
    """
    from markdown_it import MarkdownIt  # comes with rich

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def embedded(match: re.Match) -> str:
        image = base64.b64encode((folder / match.group(1)).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    body = re.sub(r'src="(plots/[\w.]+\.png)"', embedded, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>Training report</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
