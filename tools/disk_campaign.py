"""Disks that are full or read-only, a sparse model of 40 GB, and the time beside `cp`; prints JSON. Needs root for the mounts.

    python tools/disk_campaign.py FOLDER --sparse-gb 40 --data-gb 2 > docs/trust-disk.json

FOLDER needs room for the sparse model (the copy in its place is written out) and for two models of real data. `cp` does not wait for
the disk; embed-policy does, so the time of `cp` and `sync` is given beside it. Arms alternate; medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.policy import Policy

CLI = [sys.executable, "-m", "hylra_gguf"]
POLICY = Policy((1, 2, 2, 1), (0, 0, 0, 3), 2)
MODEL_BYTES = 6 << 20  # on disks of 16 MB
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

def mounted(kind: str, folder: Path) -> list[str]:
    """The command that mounts a disk of 16 MB; unmount it afterwards."""
    if kind == "tmpfs":
        return ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder / "disk")]
    with open(folder / "image", "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(folder / "image")], check=True)
    return ["mount", "-o", "loop", str(folder / "image"), str(folder / "disk")]


def refusal(kind: str, state: str, folder: Path, policy: Path) -> dict:
    """What embed-policy says on such a disk, and whether anything has changed."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(mounted(kind, folder), check=True)
    try:
        write_model(disk / "model.gguf", MODEL_BYTES)
        if state == "full":
            free = os.statvfs(disk)
            (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - MODEL_BYTES // 2))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before, names = sha256_of(disk / "model.gguf"), sorted(os.listdir(disk))
        done = subprocess.run([*CLI, "embed-policy", str(disk / "model.gguf"), "--policy", str(policy)], capture_output=True, text=True)
        unchanged = sha256_of(disk / "model.gguf") == before and sorted(os.listdir(disk)) == names
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return {"disk": f"{kind}, {state}", "exit_code": done.returncode, "lines": done.stderr.count("\n"), "unchanged": unchanged,
            "says": done.stderr.strip().replace(str(disk), "DISK")}


# ---- size and time

def sparse(folder: Path, policy: Path, size_bytes: int) -> dict:
    path = folder / "sparse.gguf"
    write_model(path, size_bytes, sparse=True)
    seconds, peak_bytes = timed([*CLI, "embed-policy", path, "--policy", policy])
    result = {"bytes": path.stat().st_size, "seconds": round(seconds, 1), "peak_memory_mb": round(peak_bytes / 2**20, 1)}
    path.unlink()
    return result


def beside_cp(folder: Path, policy: Path, size_bytes: int, repetitions: int) -> dict:
    model, copy = folder / "data.gguf", folder / "copy.gguf"
    write_model(model, size_bytes)
    arms = {"cp": ["cp", "--reflink=never", model, copy], "cp_sync": ["sh", "-c", f"cp --reflink=never {model} {copy} && sync {copy}"],
            "embed": [*CLI, "embed-policy", model, "--policy", policy], "strip": [*CLI, "strip", model]}
    seconds = {arm: [] for arm in arms}
    for _ in range(repetitions + 1):
        for arm, command in arms.items():
            copy.unlink(missing_ok=True)
            subprocess.run(["sync"], check=True)
            time.sleep(SETTLE_S)
            seconds[arm].append(timed(command)[0])
    medians = {arm: statistics.median(values[1:]) for arm, values in seconds.items()}
    model.unlink()
    copy.unlink(missing_ok=True)
    return {"bytes": size_bytes, "repetitions": repetitions, **{f"{arm}_s": round(value, 2) for arm, value in medians.items()},
            "all_s": {arm: [round(value, 2) for value in values[1:]] for arm, values in seconds.items()},
            **{f"{arm}_of_{base}": round(medians[arm] / medians[base], 2) for arm in ("embed", "strip") for base in ("cp", "cp_sync")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--sparse-gb", type=int, default=40, metavar="N")
    parser.add_argument("--data-gb", type=int, default=2, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    args = parser.parse_args()
    policy = args.folder / "policy.json"
    POLICY.save(policy)
    result = {"refused": [refusal(kind, state, args.folder, policy) for kind in ("tmpfs", "ext4") for state in ("full", "read-only")],
              "beside_cp": beside_cp(args.folder, policy, args.data_gb << 30, args.repetitions), "sparse": sparse(args.folder, policy, args.sparse_gb << 30)}
    print(json.dumps({"command": f"python tools/disk_campaign.py FOLDER --sparse-gb {args.sparse_gb} --data-gb {args.data_gb}", **result,
                      "kernel": os.uname().release, "machine": cpu_info(), "commit": commit(),
                      "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    bad = [row for row in result["refused"] if (row["exit_code"], row["lines"], row["unchanged"]) != (2, 1, True)]
    sys.exit(bool(bad or result["sparse"]["peak_memory_mb"] > 200))


if __name__ == "__main__":
    main()
