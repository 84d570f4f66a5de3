"""Publish records to an MLflow 3 store, and open its UI.

    python -m diffmoe.tracking publish --scale digits      results/digits into results/digits/local/mlflow.db
    python -m diffmoe.tracking ui --scale digits           the same, then the UI on http://127.0.0.1:5000
    python -m diffmoe.tracking send RUN --store URI        losses of a finished training run that a server missed

To follow a run while it trains: `python -m diffmoe.train --track URI`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from urllib.parse import quote, urlencode

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import read_records
from diffmoe.tracking.live import send_run
from diffmoe.tracking.publish import RECORD, publish
from diffmoe.tracking.store import EXPERIMENT, experiment, open_store, parse_store, public, store_uri


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.tracking", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("publish", "ui", "send"))
    parser.add_argument("run", nargs="?", type=Path, help="folder of a training run, for `send`")
    parser.add_argument("--scale", default="digits", help="folder of results/ (default: digits)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--store", help="SQLite file or URI (default: <results>/<scale>/local/mlflow.db)")
    parser.add_argument("--port", type=int, default=5000, help="of the UI (default: 5000)")
    options = parser.parse_args(arguments)
    folder = options.results / options.scale
    store = parse_store(options.store or str(folder / "local" / "mlflow.db"))
    if (options.run is not None) != (options.command == "send"):
        raise ConfigError("name the folder of a training run with `send`, and only there")
    if options.command == "send":
        send_run(options.run, store, options.scale)
        print(f"{options.run}: all lines are in {public(store)}")
        return 0
    _publish_all(folder, options.scale, store)
    if options.command == "ui":
        _serve(store, options.port)
    return 0


def _publish_all(folder: Path, scale: str, store: Path | str) -> None:
    tables = {scale: folder, f"{scale}, ablations": folder / "ablations", f"{scale}, local": folder / "local"}
    tables = {table: (read_records(path / "records"), path) for table, path in tables.items()}
    if not any(records for records, _ in tables.values()):
        raise ConfigError(f"{folder}: no records here or in local/; run the cells first")
    for table, (records, path) in tables.items():
        if records:
            figures = sorted((path / "figures").glob("*.png"))
            new, existing = publish(records, store, table=table, figures=figures)
            print(f"table {table}: {new} new records, {existing} were there; {public(store)}")


def _serve(store: Path | str, port: int) -> None:
    """Become MLflow's UI."""
    if isinstance(store, str) and store.startswith("http"):
        print(f"the server has a UI of its own: {public(store)}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port}: cannot be used, name another with --port ({error})") from None
    with open_store(store) as client:
        experiment_id = experiment(client, EXPERIMENT, store)
    # Without workflowType, MLflow 3 opens an experiment in its view for language models; what is not sorted, it folds.
    view = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "searchFilter": f"tags.kind = '{RECORD}'",
            "orderByKey": "metrics.`distance`", "orderByAsc": "true"}
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs?{urlencode(view, quote_via=quote)}"
    print(f"MLflow: {page}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri(store),
                              "--host", "127.0.0.1", "--port", str(port), "--workers", "1"])


if __name__ == "__main__":
    sys.exit(run_command(main))
