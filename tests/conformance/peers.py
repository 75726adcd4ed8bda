# ruff: noqa: PLC0415 - the peers are not installed where the tests run
"""Peers: Flower's mods and NVFLARE's filters, as released, through their own messages.

Each is set up so that its bound and noise are those of our site-level policy where it has such
settings, and as shipped where it has not.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from judging import Claims, NotApplicable, Refused
from odd_inputs import Case, Settings, State

if TYPE_CHECKING:
    from collections.abc import Callable

NOISE_STD = 0.05
DELTA = 1e-5
EPSILON = math.sqrt(2 * math.log(1.25 / DELTA)) / NOISE_STD  # what LocalDpMod turns into 0.05
GAMMA, PERCENTILE_GAMMA = 1e-5, 0.01  # as shipped
SVT_REACH = 1000.0  # a Laplace draw of scale 20 gamma stays under 1000 gamma


def claims(name: str, case: Case) -> Claims:
    """What the peer declares about the states of the case."""
    base, _ = case.make()
    size = sum(value.numel() for value in base.values())
    return {
        "flower-localdp": Claims(1.0, NOISE_STD),
        "flower-fixedclipping": Claims(1.0, 0.0),
        "nvflare-svt": Claims(SVT_REACH * GAMMA * math.sqrt(size), math.nan, keeps_direction=False),
        "nvflare-percentile": Claims(
            PERCENTILE_GAMMA * math.sqrt(size), 0.0, keeps_direction=False
        ),
        "nvflare-excludevars": Claims(None, 0.0),
    }[name]


def run(name: str, case: Case) -> State:
    """One release through the peer."""
    logging.disable(logging.CRITICAL)
    family, _, which = name.partition("-")
    return _flower(which, case) if family == "flower" else _nvflare(which, case)


def _on_purpose(make: Callable[[], Any], case: Case) -> Any:
    """A ValueError about odd settings is a refusal; about data it is a crash."""
    try:
        return make()
    except ValueError as error:
        if case.settings is Settings.ORDINARY:
            raise
        raise Refused("ValueError") from error


def _flower(which: str, case: Case) -> State:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    base, local = case.make()
    mod = {
        "localdp": lambda: LocalDpMod(**_localdp_settings(case.settings)),
        "fixedclipping": lambda: fixedclipping_mod,
    }[which]
    mod = _on_purpose(mod, case)

    def arrays(state: State) -> RecordDict:
        if all(isinstance(value, torch.Tensor) for value in state.values()):
            return ArrayRecord(state)
        return ArrayRecord({key: Array(value) for key, value in state.items()})

    config = ConfigRecord({"clipping_norm": _server_bound(which, case.settings)})
    message = Message(
        content=RecordDict({"arrays": arrays(base), "config": config}),
        dst_node_id=2,
        message_type="train",
    )

    def train(received: Message, _: object) -> Message:
        return Message(content=RecordDict({"arrays": arrays(local)}), reply_to=received)

    reply = mod(message, None, train)
    if reply.has_error():
        raise Refused("error reply")
    return dict(reply.content["arrays"].to_torch_state_dict())


def _localdp_settings(settings: Settings) -> dict[str, float]:
    odd: dict[Settings, dict[str, float]] = {
        Settings.BOUND_ZERO: {"clipping_norm": 0.0},
        Settings.BOUND_NAN: {"clipping_norm": math.nan},
        Settings.NO_NOISE: {"epsilon": 0.0},
        Settings.FREE_SENSITIVITY: {"sensitivity": 1e-4},
    }
    if settings is Settings.SHARE_OUT_OF_RANGE:
        raise NotApplicable
    usual = {"clipping_norm": 1.0, "sensitivity": 1.0, "epsilon": EPSILON, "delta": DELTA}
    return usual | odd.get(settings, {})


def _server_bound(which: str, settings: Settings) -> float:
    if which == "fixedclipping" and settings in {
        Settings.NO_NOISE,
        Settings.FREE_SENSITIVITY,
        Settings.SHARE_OUT_OF_RANGE,
    }:
        raise NotApplicable
    return {
        Settings.SERVER_BOUND: 1e30,
        Settings.BOUND_ZERO: 0.0,
        Settings.BOUND_NAN: math.nan,
    }.get(settings, 1.0)


def _nvflare(which: str, case: Case) -> State:
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.fl_context import FLContext
    from nvflare.client.utils import numerical_params_diff

    base, local = ({key: _array(value) for key, value in state.items()} for state in case.make())
    difference = numerical_params_diff(base, local) if base else {}
    chosen = _on_purpose(lambda: _nvflare_filter(which, case.settings), case)
    shareable = DXO(DataKind.WEIGHT_DIFF, difference).to_shareable()
    filtered = _on_purpose(lambda: chosen.process(shareable, FLContext()), case)
    out = from_shareable(filtered).data
    return {key: _added(base.get(key), value) for key, value in out.items()}


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if torch.is_tensor(value) else value)


def _added(base: np.ndarray | None, difference: Any) -> torch.Tensor:
    """What the receiver makes of it."""
    value = np.asarray(difference if base is None else base + difference)
    if base is not None and np.can_cast(value.dtype, base.dtype, "same_kind"):
        value = value.astype(base.dtype)
    return torch.from_numpy(np.array(value))


def _nvflare_filter(which: str, settings: Settings) -> Any:
    from nvflare.app_common.filters.exclude_vars import ExcludeVars
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
    from nvflare.app_common.filters.svt_privacy import SVTPrivacy

    kinds: dict[str, tuple[Any, dict[str, Any], dict[Settings, dict[str, Any]]]] = {
        "svt": (
            SVTPrivacy,
            {},
            {
                Settings.BOUND_ZERO: {"gamma": 0.0},
                Settings.BOUND_NAN: {"gamma": math.nan},
                Settings.NO_NOISE: {"noise_var": 0.0},
                Settings.SHARE_OUT_OF_RANGE: {"fraction": 1.5},
            },
        ),
        "percentile": (
            PercentilePrivacy,
            {},
            {
                Settings.BOUND_ZERO: {"gamma": 0.0},
                Settings.BOUND_NAN: {"gamma": math.nan},
                Settings.SHARE_OUT_OF_RANGE: {"percentile": 150},
            },
        ),
        "excludevars": (ExcludeVars, {"exclude_vars": ["secret.weight"]}, {}),
    }
    make, usual, odd = kinds[which]
    everywhere = {
        Settings.ORDINARY,
        Settings.SERVER_BOUND,
        Settings.STATISTICS_AS_PARAMETERS,
    }
    if settings not in odd and settings not in everywhere:
        raise NotApplicable
    return functools.partial(make, **usual)(**odd.get(settings, {}))
