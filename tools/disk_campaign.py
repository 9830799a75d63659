"""Disks that are full, read-only or over quota, a sparse model of 40 GB, the time beside `cp`; prints JSON. Needs root and mkfs.btrfs.

    python tools/disk_campaign.py FOLDER --sparse-gb 40 --data-gb 2 > docs/trust-disk.json

FOLDER needs room for the sparse model (the copy in its place is written out) and for three models of real data. `cp` does not wait for
the disk; embed-policy does, so the time of `cp` and `sync` is given beside it. Arms alternate in random order; medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.policy import Policy

CLI = [sys.executable, "-m", "hylra_gguf"]
POLICY = Policy((1, 2, 2, 1), (0, 0, 0, 3), 2)
MODEL_BYTES, DISK_BYTES, BTRFS_BYTES = 6 << 20, 16 << 20, 256 << 20  # btrfs takes no smaller one
SETTLE_S = 2.0         # nobody pays for the blocks that another arm has dirtied or freed


def write_model(path: Path, data_bytes: int, sparse: bool = False) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("first", np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    if sparse:
        os.truncate(path, data_bytes)
        return
    with open(path, "ab") as file:
        for _ in range(0, data_bytes, 64 << 20):
            file.write(os.urandom(min(64 << 20, data_bytes)))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def timed(command: list) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of a command that must succeed."""
    start = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.monotonic() - start, usage.ru_maxrss << 10


# ---- disks that refuse

REFUSALS = (("tmpfs", "full"), ("tmpfs", "read-only"), ("ext4", "full"), ("ext4", "read-only"), ("btrfs", "over quota"))


def mount(kind: str, folder: Path) -> Path:
    """A small disk of its own; unmount it afterwards."""
    disk, image = folder / "disk", folder / "image"
    disk.mkdir(exist_ok=True)
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
        return disk
    image.unlink(missing_ok=True)
    image.touch()
    os.truncate(image, DISK_BYTES if kind == "ext4" else BTRFS_BYTES)
    subprocess.run({"ext4": ["mkfs.ext4", "-q", "-O", "^has_journal", image], "btrfs": ["mkfs.btrfs", "-q", image]}[kind], check=True, stdout=sys.stderr)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    return disk


def make_refuse(state: str, disk: Path) -> tuple[Path, list]:
    """(a model, where its copy shall go: nothing or -o OUT), and a disk that has no room for it."""
    if state == "over quota":  # a copy within btrfs shares its blocks and costs nothing: so the model comes from elsewhere
        for command in (["quota", "enable", disk], ["subvolume", "create", disk / "home"], ["qgroup", "limit", str(MODEL_BYTES // 2), disk / "home"]):
            subprocess.run(["btrfs", *command], check=True, stdout=subprocess.DEVNULL)
        write_model(disk.parent / "model.gguf", MODEL_BYTES)
        return disk.parent / "model.gguf", ["-o", disk / "home/out.gguf"]
    write_model(disk / "model.gguf", MODEL_BYTES)
    if state == "full":
        free = os.statvfs(disk)
        (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - MODEL_BYTES // 2))
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return disk / "model.gguf", []


def refusal(kind: str, state: str, folder: Path, policy: Path) -> dict:
    """What embed-policy says on such a disk, and whether anything has changed."""
    disk = mount(kind, folder)
    try:
        model, out = make_refuse(state, disk)
        before, names = sha256_of(model), sorted(disk.rglob("*"))
        done = subprocess.run([*CLI, "embed-policy", model, "--policy", policy, *out], capture_output=True, text=True)
        unchanged = sha256_of(model) == before and sorted(disk.rglob("*")) == names
    finally:
        subprocess.run(["umount", disk], check=True)
    return {"disk": f"{kind}, {state}", "exit_code": done.returncode, "lines": done.stderr.count("\n"), "unchanged": unchanged,
            "says": done.stderr.strip().replace(str(disk), "DISK")}


def sparse(folder: Path, policy: Path, size_bytes: int) -> dict:
    path = folder / "sparse.gguf"
    write_model(path, size_bytes, sparse=True)
    seconds, peak_bytes = timed([*CLI, "embed-policy", path, "--policy", policy])
    result = {"bytes": path.stat().st_size, "seconds": round(seconds, 1), "peak_memory_mb": round(peak_bytes / 2**20, 1)}
    path.unlink()
    return result


# ---- beside cp

def groups_of(folder: Path, policy: Path) -> list[dict[str, list]]:
    """Arms as commands; those of a group run one behind the other: what is written over must be there, what is stripped must have a policy."""
    model, copy, out = (folder / name for name in ("data.gguf", "copy.gguf", "out.gguf"))
    cp = ["cp", "--reflink=never", model, copy]
    cp_sync = ["sh", "-c", f"cp --reflink=never {model} {copy} && sync {copy}"]
    embed, strip = [*CLI, "embed-policy", model, "--policy", policy], [*CLI, "strip", model]
    return [{"cp": cp, "cp_over": cp}, {"cp_sync": cp_sync, "cp_sync_over": cp_sync},
            {"embed_out": [*embed, "-o", out]}, {"embed": embed, "strip_out": [*strip, "-o", out], "strip": strip}]


def one_round(folder: Path, groups: list[dict[str, list]]) -> dict[str, float]:
    """Seconds of each arm; the groups come in random order."""
    seconds = {}
    for group in random.sample(groups, len(groups)):
        for arm, command in group.items():
            (folder / "out.gguf").unlink(missing_ok=True)
            subprocess.run(["sync"], check=True)
            time.sleep(SETTLE_S)
            seconds[arm] = timed(command)[0]
        (folder / "copy.gguf").unlink(missing_ok=True)
    return seconds


def beside_cp(folder: Path, policy: Path, size_bytes: int, repetitions: int) -> dict:
    """The ratios are medians of the ratios within a round. In place the old file is given up, as when cp writes over a file."""
    write_model(folder / "data.gguf", size_bytes)
    random.seed(0)
    rounds = [one_round(folder, groups_of(folder, policy)) for _ in range(repetitions + 1)][1:]
    for name in ("data.gguf", "out.gguf"):
        (folder / name).unlink(missing_ok=True)
    pairs = [(f"{ours}{place}", f"{cp}{over}") for ours in ("embed", "strip") for cp in ("cp", "cp_sync") for place, over in (("_out", ""), ("", "_over"))]
    pairs += [(ours, "cp") for ours in ("embed", "strip")]
    return {"bytes": size_bytes, "repetitions": repetitions,
            **{f"{ours}_of_{cp}": round(statistics.median(row[ours] / row[cp] for row in rounds), 2) for ours, cp in pairs},
            "median_s": {arm: round(statistics.median(row[arm] for row in rounds), 2) for arm in rounds[0]},
            "all_s": {arm: [round(row[arm], 2) for row in rounds] for arm in rounds[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--sparse-gb", type=int, default=40, metavar="N")
    parser.add_argument("--data-gb", type=int, default=2, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        policy = folder / "policy.json"
        POLICY.save(policy)
        result = {"refused": [refusal(*case, folder, policy) for case in REFUSALS],
                  "beside_cp": beside_cp(folder, policy, args.data_gb << 30, args.repetitions), "sparse": sparse(folder, policy, args.sparse_gb << 30)}
    print(json.dumps({"command": f"python tools/disk_campaign.py FOLDER --sparse-gb {args.sparse_gb} --data-gb {args.data_gb}", **result,
                      "kernel": os.uname().release, "machine": cpu_info(), "commit": commit(),
                      "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    bad = [row for row in result["refused"] if (row["exit_code"], row["lines"], row["unchanged"]) != (2, 1, True)]
    sys.exit(bool(bad or result["sparse"]["peak_memory_mb"] > 200))


if __name__ == "__main__":
    main()
