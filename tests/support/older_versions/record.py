"""Record what the present version leaves when it is killed with unfinished jobs.

Run `python tests/support/older_versions/record.py` before a release, and before the jobs database or the workflows change. It
writes `schema-NNNN.json`, with the rows of all tables and the files of the storage. tests/services/jobs/test_upgrade.py lets
the present version finish such jobs.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "clients/python/src"), str(FOLDER.parent)]

from older_versions import BODIES, EXECUTOR, IDEMPOTENCY_KEY, STEPS, uploads  # noqa: E402


def leave_unfinished_jobs(folder: Path) -> None:
    """Start three jobs in this process and kill it: a begun dataset, a queued one, and a begun projection."""
    from service_kit import service, wait_for
    from tiny import make_bundle

    bundle = make_bundle(folder / "bundles" / "tiny")
    with service(bundle.location, folder / "data", executor_id=EXECUTOR, shard_concurrency=2) as running:
        first = running.ask(BODIES[0], **{"Idempotency-Key": IDEMPOTENCY_KEY})
        running.wait_for_shards(first, 2)
        running.generator.gate.clear()
        running.projector.gate.clear()
        running.ask(BODIES[1])
        answer = running.client.post(f"/v1/projections?steps={STEPS}", files=uploads())
        assert answer.status_code == 202, answer.text
        wait_for(lambda: running.projector.calls == 1)
        (folder / "digest").write_text(bundle.digest)
        os.kill(os.getpid(), signal.SIGKILL)


def rows_of(database: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of all tables of an SQLite file, by table."""
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        tables = {name: connection.execute(f'SELECT * FROM "{name}"').fetchall() for (name,) in names.fetchall()}
    return {name: [dict(row) for row in rows] for name, rows in tables.items() if rows}


def main() -> None:
    """Record the present version."""
    if len(sys.argv) == 2:
        leave_unfinished_jobs(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, name], check=False)
        tables = rows_of(folder / "data" / "jobs.sqlite")
        storage = folder / "data" / "datasets"
        paths = sorted(path for path in storage.rglob("*") if path.is_file())
        files = {
            str(path.relative_to(storage)): base64.b64encode(path.read_bytes()).decode()
            for path in paths
            if not path.name.startswith("writing-")
        }
        schema = tables.pop("dermis_schema_version", [{"version_num": "0001"}])[0]["version_num"]
        record = {"schema": schema, "digest": (folder / "digest").read_text(), "tables": tables, "files": files}
        out = FOLDER / f"schema-{schema}.json"
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(out)


if __name__ == "__main__":
    main()
