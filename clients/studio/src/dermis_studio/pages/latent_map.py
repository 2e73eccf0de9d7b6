"""The map of the page Explore: edited images on a plane of two directions, in which a visitor clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dermis_client import AsyncDermisClient, EditParams, SweepParams
from PIL import Image

from dermis_studio import markup
from dermis_studio.samples import png

CELLS = 5  # images along each side
CELL_PIXELS = 96

# A pointer chooses any point; the keyboard chooses the middle of an image.
ON_LOAD = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-cell]');
  if (!cell) return;
  const map = cell.closest('.ds-map');
  const reach = Number(map.dataset.reach);
  const box = map.getBoundingClientRect();
  let [x, y] = JSON.parse(cell.dataset.cell);
  if (event.detail > 0) {
    const size = Number(map.dataset.cells);
    const at = (share) => (share * size - size / 2) * 2 * reach / (size - 1);
    x = at((event.clientX - box.left) / box.width);
    y = -at((event.clientY - box.top) / box.height);
  }
  const rounded = (value) => Math.round(Math.max(-4, Math.min(4, value)) * 10) / 10;
  trigger('select', { x: rounded(x), y: rounded(y), names: [map.dataset.x, map.dataset.y] });
  const mark = map.querySelector('.ds-map-mark');
  const place = (value) => 50 + 50 * value * (Number(map.dataset.cells) - 1) / Number(map.dataset.cells) / reach;
  mark.style.left = place(x) + '%';
  mark.style.top = (100 - place(y)) + '%';
  mark.hidden = false;
});
"""


def strengths_of(reach: float) -> list[float]:
    """The strengths of the images along each side, in order."""
    return [round(reach * (2 * place / (CELLS - 1) - 1), 3) for place in range(CELLS)]


async def pictures(
    client: AsyncDermisClient,
    arguments: Mapping[str, Any],
    others: Sequence[EditParams],
    names: tuple[str, str],
    reach: float,
) -> list[list[Image.Image]]:
    """Generate the images of a map, row by row from the top.

    Args:
        client: The client of the visitor.
        arguments: Arguments of the SDK that name the start.
        others: Edits of all images.
        names: Directions to the right and to the top.
        reach: Strength at the edges.
    """
    rows = []
    for strength in reversed(strengths_of(reach)):
        upwards: EditParams = {"direction": names[1], "strength": strength}
        edits = [*others, upwards] if strength else others
        sweep: SweepParams = {"direction": names[0], "strengths": strengths_of(reach)}
        rows.append([image.image for image in await client.edits.create(**arguments, edits=edits or None, sweep=sweep)])
    return rows


def drawn(rows: Sequence[Sequence[Image.Image]], names: tuple[str, str], reach: float) -> str:
    """Return a map as HTML."""
    strengths = strengths_of(reach)
    cells = ""
    for y, row in zip(reversed(strengths), rows, strict=True):
        for x, image in zip(strengths, row, strict=True):
            small = image.resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.LANCZOS)
            words = f"{names[0]} {x:+.1f}, {names[1]} {y:+.1f}"
            cells += (
                f'<button type="button" data-cell="{markup.attribute([x, y])}" aria-label="{escape(words)}" '
                f'title="{escape(words)}"><img src="{markup.data_url(png(small), "image/png")}" alt="" '
                f'width="{CELL_PIXELS}" height="{CELL_PIXELS}"></button>'
            )
    size = CELLS * CELL_PIXELS
    return (
        f'<figure class="ds-map-figure"><div class="ds-map" role="group" aria-label="Map of {escape(names[0])} and '
        f'{escape(names[1])}" style="width:{size}px" data-reach="{reach}" data-cells="{CELLS}" '
        f'data-x="{escape(names[0])}" data-y="{escape(names[1])}">{cells}<span class="ds-map-mark" hidden></span></div>'
        f'<figcaption class="ds-muted">To the right: {escape(names[0])} from {-reach:g} to {reach:g}. To the top: '
        f"{escape(names[1])}, the same range. Images are reduced to {CELL_PIXELS} px (Lanczos). Click to move the edited "
        "image there.</figcaption></figure>"
    )


def moved(
    message: Mapping[str, Any], names: Sequence[str], strengths: Sequence[float], most: int
) -> tuple[list[str], list[float]]:
    """Return the chosen directions and their strengths after a click.

    Args:
        message: What the browser sent.
        names: The directions that are chosen.
        strengths: The strength of each slider.
        most: Number of sliders.

    Raises:
        ValueError: The message is not one of the map.
    """
    try:
        moves = dict(zip(map(str, message["names"]), (float(message["x"]), float(message["y"])), strict=True))
    except (KeyError, TypeError, ValueError):
        raise ValueError("the map does not fit this page; draw it again") from None
    values = dict(zip(names, strengths, strict=False))
    kept = [name for name in names if name not in moves][: most - len(moves)]
    order = [name for name in names if name in moves or name in kept]
    order += [name for name in moves if name not in order]
    return order, [moves.get(name, values.get(name, 0.0)) for name in order]
