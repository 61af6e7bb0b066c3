"""A page with each picture and its caption side by side, to read them through before training."""

from __future__ import annotations

import base64
import html
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images.loading import UnreadableImageError, open_image, to_rgb_and_alpha  # noqa: E402
from prepare.caption_files import CaptionFiles, MetadataFile, write_caption  # noqa: E402

THUMBNAIL_PX = 320
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2126; background: #fbfbfa; max-width: 60rem; margin: 2rem auto }
article { display: flex; gap: 1.2rem; padding: 1rem 0; border-top: 1px solid #ddd }
img { width: 14rem; object-fit: contain }
h2 { font-size: .85rem; color: #6a7078; margin: 0 } p { margin: .3rem 0 } .missing { color: #c8553d }
"""


def thumbnail(path: Path) -> str:
    """An <img> with the small picture inside it."""
    try:
        picture = to_rgb_and_alpha(open_image(path))[0]
    except UnreadableImageError as error:
        return f'<p class="missing">{html.escape(str(error))}</p>'
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}">'


def write_review(page: Path, pictures: list[Path], captions: CaptionFiles | MetadataFile) -> None:
    """Write the page. captions: CaptionFiles or MetadataFile."""
    articles = []
    for path in pictures:
        caption = captions.get(path)
        text = f"<p>{html.escape(caption)}</p>" if caption else '<p class="missing">no caption yet</p>'
        articles.append(f"<article>{thumbnail(path)}<div><h2>{html.escape(path.name)}</h2>{text}</div></article>")
    page.parent.mkdir(parents=True, exist_ok=True)
    head = f'<meta charset="utf-8"><title>Captions</title><style>{STYLE}</style>'
    body = f"<h1>{len(pictures)} pictures and their captions</h1>{''.join(articles)}"
    write_caption(page, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>')
