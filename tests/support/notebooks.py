"""Runs the notebooks of examples/. As a program it writes their outputs into the files, against a service:

python tests/support/notebooks.py http://127.0.0.1:3000
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 600  # limit of a cell, which detects one that hangs


def execute(path: Path, url: str, folder: Path) -> Any:
    """Run a notebook in an empty folder and return it with its new outputs. Raises CellExecutionError if a cell fails.

    Args:
        path: The notebook.
        url: Address of the service that it uses.
        folder: The working directory of its cells.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["DERMIS_BASE_URL"] = url
    try:
        client = NotebookClient(
            notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}, record_timing=False
        )
        return client.execute()
    finally:
        del os.environ["DERMIS_BASE_URL"]


def printed(notebook: Any) -> str:
    """Return all that the cells of a notebook have printed, and the texts of their results."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    texts += [output.data.get("text/html", "") for output in outputs if "data" in output]
    return "\n".join(texts)


def main() -> None:
    import nbformat

    for path in sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, sys.argv[1], Path(folder))
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                # The text of a result repeats its HTML, with identifiers that differ each time.
                if "data" in output and "text/html" in output.data:
                    output.data.pop("text/plain", None)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(re.findall('data:image', path.read_text()))} pictures")


if __name__ == "__main__":
    main()
