"""Gives a model of onnxruntime-genai's builder logits of all positions, which its engine asks for.

`prune_lm_head` leaves a Gather of the last position and an Unsqueeze before the last product; without them the graph is what
the builder makes without that option. The weights are linked, not copied.
"""

import os

import onnx


def write(source, directory):
    """Makes `directory` from `source`, a model that was built with `prune_lm_head=true`."""
    model = onnx.load(source / "model.onnx", load_external_data=False)
    unprune(model.graph)
    directory.mkdir(parents=True)
    onnx.save(model, directory / "model.onnx")
    for file in source.iterdir():
        if file.name != "model.onnx":
            os.link(file.resolve(), directory / file.name)


def unprune(graph):
    """Lets the last product read what the Gather read."""
    outputs = {name: node for node in graph.node for name in node.output}
    unsqueeze = next((node for node in graph.node if node.name.startswith("/lm_head/prune/Unsqueeze")), None)
    if unsqueeze is None:
        raise ValueError(
            "the model has no /lm_head/prune/Unsqueeze, it was built without prune_lm_head or by another builder"
        )
    gather = outputs[unsqueeze.input[0]]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == unsqueeze.output[0]:
                node.input[index] = gather.input[0]
    graph.node.remove(unsqueeze)
    graph.node.remove(gather)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    for info in list(graph.value_info):
        if info.name in (*unsqueeze.output, *gather.output):
            graph.value_info.remove(info)
        elif info.name.startswith("/lm_head/"):
            info.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
