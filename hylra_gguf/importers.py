"""Read the layer choices that other systems publish; one that was written for another number of layers is refused.

Formats: Kascade's head map (.npy), UCM's GSA on-device configuration (JSON), full/shared patterns of IndexCache and DSA models.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .errors import PolicyError
from .solver import NO_SOURCE, Plan, Problem, drop_idle

ROLLBACK, SKIP, LAYERS = "vllm_hash_attention_rollback_layers", "vllm_hash_attention_skip_layers", "num_hidden_layers"


# -- checks that all share --------------------------------------------------------------------------------------------


def check_length(where: str, found: int, problem: Problem) -> None:
    layers = len(problem.eligible)
    if found != layers:
        raise PolicyError(f"{where}: written for {found} layers, but the model has {layers}; take the list of this very model")


def check_selects(where: str, layer: int, problem: Problem) -> None:
    layers = len(problem.eligible)
    if not 0 <= layer < layers:
        raise PolicyError(f"{where}: layer {layer} is not in the model; expected 0 to {layers - 1}")
    if not problem.eligible[layer]:
        raise PolicyError(f"{where}: layer {layer} cannot select, its attention does not span the whole cache; leave it out")


def linked(roles: str, problem: Problem, where: str) -> Plan:
    """roles: F full, S select or R reuse for each layer; a reuse layer takes the latest select layer before it.

    A layer that may not reuse (its attention does not span the cache, or it is above the sensitivity bound) is full instead.
    """
    sources, current = [], NO_SOURCE
    for layer, role in enumerate(roles):
        if role == "S":
            check_selects(where, layer, problem)
            current = layer
        if role == "R" and problem.eligible[layer] and current == NO_SOURCE:
            raise PolicyError(f"{where}: layer {layer} reuses, but no layer before it selects; the first layer that can must select")
        sources.append(current if role == "S" or (role == "R" and problem.may_reuse[layer]) else NO_SOURCE)
    return Plan(drop_idle(sources))


# -- formats ----------------------------------------------------------------------------------------------------------


def pattern(problem: Problem, pattern: str = "") -> Plan:
    """"FFSFSS...": F (full indexer) selects, S (shared) reuses the latest F; vLLM, SGLang and IndexCache write them so."""
    odd = sorted(set(pattern) - set("FS"))
    if odd or not pattern:
        raise PolicyError(f"--pattern: found {odd[0]!r}, expected one letter F or S per layer" if odd else
                          "--strategy pattern: no pattern given; add for example --pattern FFSFSS")
    check_length("--pattern", len(pattern), problem)
    return linked(pattern.replace("S", "R").replace("F", "S"), problem, "--pattern")


def ucm(problem: Problem, ucm: str | None = None) -> Plan:
    """UCM's GSA on-device: rollback layers are full, skipped layers reuse the select layer before them, all others select."""
    if ucm is None:
        raise PolicyError("--strategy ucm: no configuration given; add --ucm FILE")
    values = read_json(ucm)
    if not isinstance(values, dict) or ROLLBACK not in values or SKIP not in values:
        raise PolicyError(f"{ucm}: no {ROLLBACK} and {SKIP} in it, so it names no layers; take a configuration that has both")
    rollback, skip = values[ROLLBACK], values[SKIP]
    if not (is_list_of(rollback, int) and is_list_of(skip, bool)):
        raise PolicyError(f"{ucm}: expected {ROLLBACK} to be layer numbers and {SKIP} true or false per layer")
    for found in (values.get(LAYERS, len(skip)), len(skip)):
        check_length(ucm, found, problem)
    if rollback and not 0 <= min(rollback) <= max(rollback) < len(skip):
        raise PolicyError(f"{ucm}: {ROLLBACK} names layers {min(rollback)} to {max(rollback)}, expected 0 to {len(skip) - 1}")
    roles = ["F" if layer in rollback else "R" if skipped else "S" for layer, skipped in enumerate(skip)]
    return linked("".join(roles), problem, ucm)


def head_map(path: str, layer_count: int, head_kv_count: int) -> np.ndarray:
    """Kascade's [n_layer, n_head_kv]: the KV head of the anchor whose cells a KV head takes."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PolicyError(f"{path}: cannot read the head map: {getattr(error, 'strerror', None) or 'not a .npy file'}") from None
    expected = (layer_count, head_kv_count)
    if getattr(found, "shape", None) != expected or found.dtype.kind not in "iu":
        shape = list(getattr(found, "shape", ()))
        raise PolicyError(f"{path}: found {shape}, expected whole numbers of [{layer_count} layers, {head_kv_count} KV heads]; "
                          "take the head map of this very model")
    if not ((0 <= found) & (found < head_kv_count)).all():
        raise PolicyError(f"{path}: names KV heads {found.min()} to {found.max()}, expected 0 to {head_kv_count - 1}")
    return found


def read_json(path: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"{path}: cannot read the configuration: {error.strerror or error}") from None
    except ValueError:
        raise PolicyError(f"{path}: not JSON; give a configuration file of UCM's GSA on-device") from None


def is_list_of(value, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
