"""The rows of the performance table about prompts whose length may vary: what that costs, and what it saves a short prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks.performance_model import KEEPS, NEW, TEXT, VISUAL, Reference, plan_for
from benchmarks.performance_rows import Case, Row, judge
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.graph_passes.decoder import Decoder, find_decoder
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.prefill import build_prefill

PROMPTS: Final = ((TEXT, TEXT), (TEXT, TEXT // 2), (5 * TEXT, TEXT))
"""How much text the graphs are made for, and how much a prompt has."""


def text_rows(case: Case) -> list[Row]:
    """Prefill of dynamic text over static, of prompts that fill it and of prompts that do not."""
    reference = case.reference()
    decoder = find_decoder(reference.dynamic("decoder"))
    rows = []
    for what, plan in (("unpruned", Plan()), (f"pruned to {KEEPS[-1]}", plan_for(VISUAL, KEEPS[-1], reference.layer))):
        for room, words in PROMPTS:
            arms = {name: _load(reference, decoder, plan, room, words, dynamic=name == "dynamic") for name in ("dynamic", "static")}
            seconds = case.take_turns(arms)
            name = f"{what} prefill, dynamic text over static, {words} of {room} text tokens"
            rows.append(judge(name, seconds["dynamic"], seconds["static"]))
    return rows


def _load(reference: Reference, decoder: Decoder, plan: Plan, room: int, words: int, *, dynamic: bool) -> Callable[[], object]:
    """Prefill with room for ``room`` text tokens, to be fed ``words`` of them; a static one is fed padding too, which costs the same."""
    made_for = Profile(visual_tokens=VISUAL, max_text=room, max_new_tokens=NEW, dynamic_text=dynamic)
    cuttings = make_cuttings(plan, made_for, reference.bundle.manifest.geometry)
    prefill = FixShapes()(build_prefill(decoder, made_for, plan, cuttings, (1, VISUAL))).model
    fed = made_for.model_copy(update={"max_text": words}) if dynamic else made_for
    return reference.load_model(prefill, f"text-{room}-{words}-{dynamic}", fed).run
