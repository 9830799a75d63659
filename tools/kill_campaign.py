"""Kills `hylra-gguf embed-policy` and `strip` with SIGKILL at random moments, and checks what is left; prints JSON.

    python tools/kill_campaign.py MODEL --policy POLICY --kills 500 > docs/trust-kills.json

MODEL is changed all the time and is the dense file again at the end. After each kill it must be the old or the new file, by its
sha256, and after the next whole run nothing else may lie in its folder. Half of the moments are drawn from the length of a whole
run, half from the time after the copy has begun.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.gguf_header import strip
from hylra_gguf.policy import Policy


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Campaign:
    """Two files, the dense one and the one with the policy, and commands that lead from one to the other."""

    def __init__(self, model: Path, policy: Policy, seed: int = 0):
        self.model, self.folder, self.rng = model, tempfile.mkdtemp(), random.Random(seed)
        strip(model)
        policy.save(os.path.join(self.folder, "policy.json"))
        self.beside = set(os.listdir(model.parent))
        self.counts = dict(kills=0, too_late=0, old_file=0, new_file=0, left_a_temporary_file=0, broken_files=0, leftovers_after_the_next_run=0)
        self.duration_s, self.hashes = {}, {"strip": sha256_of(model)}
        for action in ("embed-policy", "strip", "embed-policy"):
            self.duration_s[action], self.hashes[action] = self.complete(action), sha256_of(model)

    def start(self, action: str) -> subprocess.Popen:
        extra = ["--policy", os.path.join(self.folder, "policy.json")] if action == "embed-policy" else []
        return subprocess.Popen([sys.executable, "-m", "hylra_gguf", action, str(self.model), *extra], stdout=subprocess.DEVNULL)

    def complete(self, action: str) -> float:
        """Seconds of one whole run."""
        start = time.monotonic()
        if self.start(action).wait():
            sys.exit(f"hylra-gguf {action} {self.model} failed")
        return time.monotonic() - start

    def run(self, kills: int) -> dict:
        state = "embed-policy"  # the command whose file stands there
        while self.counts["kills"] < kills:
            action = "strip" if state == "embed-policy" else "embed-policy"
            state = self.kill_one(action, state)
            if self.rng.random() < 0.5:  # else another kill comes first
                state = self.complete_and_look("strip" if state == "embed-policy" else "embed-policy")
        self.complete_and_look("strip")
        shutil.rmtree(self.folder)
        return self.counts

    def kill_one(self, action: str, state: str) -> str:
        process = self.start(action)
        self.wait(process, self.duration_s[action])
        process.kill()
        if process.wait() != -signal.SIGKILL:
            self.counts["too_late"] += 1
            return action
        found = sha256_of(self.model)
        self.counts["kills"] += 1
        self.counts["old_file"] += found == self.hashes[state]
        self.counts["new_file"] += found == self.hashes[action]
        self.counts["broken_files"] += found not in self.hashes.values()
        self.counts["left_a_temporary_file"] += set(os.listdir(self.model.parent)) != self.beside
        return action if found == self.hashes[action] else state

    def wait(self, process: subprocess.Popen, duration_s: float) -> None:
        """To a moment of the whole run, or of the time after the copy has begun: before it, Python is still starting."""
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0.3, 1.05) * duration_s)
            return
        while process.poll() is None and set(os.listdir(self.model.parent)) == self.beside:
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.5) * duration_s)

    def complete_and_look(self, action: str) -> str:
        self.complete(action)
        self.counts["broken_files"] += sha256_of(self.model) != self.hashes[action]
        self.counts["leftovers_after_the_next_run"] += set(os.listdir(self.model.parent)) != self.beside
        return action


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="in a folder where nothing else is written meanwhile")
    parser.add_argument("--policy", required=True, metavar="POLICY")
    parser.add_argument("--kills", type=int, default=500, metavar="N")
    args = parser.parse_args()
    start = time.monotonic()
    counts = Campaign(args.model, Policy.load(args.policy)).run(args.kills)
    print(json.dumps({"command": f"python tools/kill_campaign.py MODEL --policy POLICY --kills {args.kills}", **counts,
                      "model_bytes": args.model.stat().st_size, "seconds": round(time.monotonic() - start), "machine": cpu_info(),
                      "commit": commit(), "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    sys.exit(bool(counts["broken_files"] or counts["leftovers_after_the_next_run"]))


if __name__ == "__main__":
    main()
