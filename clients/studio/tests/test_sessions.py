"""Tests of what Gradio keeps of an open page."""

from __future__ import annotations

import asyncio
import gc

import gradio as gr
import gradio.state_holder
import pytest
from dermis_studio.app import Session


def test_session_keeps_no_values_and_one_component_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradio.state_holder, "SessionState", Session)
    with gr.Blocks(analytics_enabled=False) as blocks:
        upload, picture, words = gr.Textbox(), gr.HTML(), gr.HTML()

        def show(value: str) -> tuple[object, object]:
            shown, changed = f"<p>{value}</p>", gr.update(visible=True)
            return (changed, shown) if value.startswith("odd") else (shown, changed)

        gr.Button().click(show, upload, [picture, words])
    holder = gradio.state_holder.StateHolder()
    holder.set_blocks(blocks)
    (function,) = blocks.fns

    def act(times: int) -> None:
        for number in range(times):
            value = ("odd " if number % 2 else "even ") * 1000
            result = asyncio.run(blocks.process_api(function, [value], state=holder["page"]))
            assert result["data"][number % 2] == f"<p>{value}</p>" and result["data"][1 - number % 2]["visible"]

    def known() -> tuple[int, int]:
        gc.collect()
        return len(holder["page"].blocks_config.blocks), sum(type(each) is gr.HTML for each in gc.get_objects())

    act(2)
    before = known()
    act(10)
    assert known() == before
    assert list(holder["page"].components) == []
