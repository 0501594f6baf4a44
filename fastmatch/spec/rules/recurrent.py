"""Fused recurrent cells and layers: every gate has one entry for each hidden unit."""

from __future__ import annotations

from collections.abc import Sequence

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record
from fastmatch.spec.rules.registry import cut, rule, set_saved

__all__: list[str] = []


def _gates(call: Call, stacked: Sequence[Label], units: Label) -> None:
    """Unite every gate of axes that stack them with the hidden units."""
    for label in stacked:
        for gate in cut(label, [units.size] * (label.size // units.size), call.name):
            unify(gate, units, call.name)


@rule("mkldnn_rnn_layer")
def _layer(record: Record, call: Call) -> None:
    inputs, state = record.labels(call["input"]), record.labels(call["hx_"])
    units = state[-1]
    unify(units, record.labels(call["cx_"])[-1], call.name)
    weights = [record.labels(call[f"weight{k}"]) for k in range(4)]
    _gates(call, [labels[0] for labels in weights if labels[0].size > 1], units)
    unify(inputs[-1], weights[0][1], call.name)
    unify(units, weights[1][1], call.name)
    time = 1 if call["batch_first"] else 0
    pin(inputs[time], call.name)
    for label in (inputs[-1], units):
        record.contract(label)
    outputs, *states = call.outputs
    record.set(outputs, [*inputs[:-1], units])
    record.mark_consumed(call, "input", len(inputs) - 1)
    record.mark_produced(call, [*inputs[:-1], units], len(inputs) - 1)
    for tensor in states[:2]:
        record.set(tensor, state)
    set_saved(record, call, states[2:], [*inputs, *state])


@rule("_thnn_fused_gru_cell", "_thnn_fused_lstm_cell")
def _cell(record: Record, call: Call) -> None:
    memory = record.labels(call["cx"] if "cx" in call.arguments else call["hx"])
    gates = [record.labels(call[name]) for name in ("input_gates", "hidden_gates")]
    biases = [
        record.labels(call[name])[0] for name in ("input_bias", "hidden_bias") if call[name] is not None
    ]
    for labels in gates:
        for mine, label in zip(memory[:-1], labels[:-1], strict=True):
            unify(mine, label, call.name)
    _gates(call, [*(labels[-1] for labels in gates), *biases], memory[-1])
    *states, workspace = call.outputs
    for tensor in states:
        record.set(tensor, memory)
    set_saved(record, call, [workspace], memory)


@rule("_pack_padded_sequence")
def _packed(record: Record, call: Call) -> None:
    """Steps of all sequences in one row; what is beside them stays."""
    labels = record.labels(call["input"])
    for label in [*labels[:2], *record.labels(call["lengths"])]:
        pin(label, call.name)
    record.mix(labels, {0, 1})
    steps, sizes = call.outputs
    record.set(steps, [Label(len(steps), pinned=call.name), *labels[2:]])
    record.set(sizes, [Label(len(sizes), pinned=call.name)])
