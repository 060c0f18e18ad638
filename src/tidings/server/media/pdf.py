"""Documents, in the child: how many pages, and the first one as a picture. PDFium without scripts and forms."""

from collections.abc import Sequence
from typing import BinaryIO, Final

import pypdfium2
from PIL import Image
from pypdfium2.raw import FPDF_ERR_PASSWORD

from tidings.server.media.facts import Looked, MediaLimits, Preview, Trouble
from tidings.server.media.images import previews_of

__all__ = ["look_at_pdf"]

# A page is a page as far as its sides are within 200 inches, the format's own bound; beyond, its picture is cut in
# size.
POINTS_MAX: Final = 14_400


def look_at_pdf(file: BinaryIO, limits: MediaLimits, wanted: Sequence[Preview]) -> Looked:
    """Pages, sides of the first one in points, its thumbhash and previews. Raises `Trouble`."""
    try:
        document = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        # Only who has the password may see it.
        raise Trouble("unsupported" if error.err_code == FPDF_ERR_PASSWORD else "broken") from None
    pages = len(document)
    if pages < 1:
        raise Trouble("broken")
    known = Looked(pages=pages)
    try:
        page = document[0]
        width, height = page.get_size()
        if not (1 <= width <= POINTS_MAX and 1 <= height <= POINTS_MAX):
            raise Trouble("unsupported", known)
        known = Looked(pages=pages, width=round(width), height=round(height))
        side = max([1, *(preview.side for preview in wanted)])
        # Twice the sides at most: a page of letters has to be read, a business card need not fill a screen.
        scale = min(side / max(width, height), 2.0)
        image: Image.Image = page.render(scale=scale, may_draw_forms=False).to_pil().convert("RGB")
    except pypdfium2.PdfiumError:
        raise Trouble("broken", known) from None
    except MemoryError:
        raise Trouble("too_much_memory", known) from None
    return previews_of(image, known, limits, wanted)
