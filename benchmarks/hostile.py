"""What a server answers to hostile requests: status, text, time, growth of its memory, and who was talked to.

    python benchmarks/hostile.py [--markdown FILE]

The cases are those of tests/test_hostile.py. The server runs in a process of its own, with deadlines of 5 s for silence
and 12 s for all of one opening. Memory: the highest resident set while a case runs, less that before it. Canary:
connections to a server that must not be reached, at any address of this machine; 0 in every row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile_app import attacked_server
from hostile_cases import CASES

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, attacked_server(Path(folder)) as server:
        world = server.world
        client = httpx.Client(trust_env=False, timeout=60)
        client.get(f"{server.url}/cog/geocentroids/info", params={"url": "whole.tif"}).raise_for_status()
        rows = []
        for name, make in CASES.items():
            world.attacker.routes.clear()
            case = make(world)
            canary, asked = world.canary.connections, len(world.attacker.asked)
            before = peak_bytes(server.pid, reset=True)
            start = time.perf_counter()
            answer = case.send(client, server.url)
            took_s = time.perf_counter() - start
            text = answer.json()["detail"] if answer.status_code != 200 else answer.headers["content-type"]
            for port, word in ((world.attacker.port, "HERE"), (world.canary.port, "CANARY")):
                text = text.replace(str(port), word)
            rows.append(
                [
                    name,
                    str(answer.status_code),
                    text if len(text) <= 100 else text[:97] + "...",
                    f"{took_s:.2f}",
                    f"{max(0, peak_bytes(server.pid) - before) / MIB:.0f}",
                    str(len(world.attacker.asked) - asked),
                    str(world.canary.connections - canary),
                ]
            )
            print("  ".join(cell.ljust(width) for cell, width in zip(rows[-1], (50, 4, 100, 6, 5, 3, 2), strict=True)))
    print(
        f"{len(rows)} cases, longest {max(float(row[3]) for row in rows):.2f} s, most memory "
        f"{max(int(row[4]) for row in rows)} MiB, connections to the canary {sum(int(row[6]) for row in rows)}"
    )
    if options.markdown is not None:
        options.markdown.write_text(table(rows), encoding="utf-8")


def peak_bytes(pid: int, *, reset: bool = False) -> int:
    """Return the highest resident set of a process since it was reset; after a reset, what it is now."""
    if reset:
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def table(rows: list[list[str]]) -> str:
    """Return rows as Markdown."""
    head = ["input", "status", "answer", "s", "MiB", "requests to it", "canary"]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
