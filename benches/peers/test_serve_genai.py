"""The worker for onnxruntime-genai, with a library that counts, and the graph that its engine asks for."""

import sys
import types

import pytest

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
pytest.importorskip("tokenizers")


class Request:
    def __init__(self, engine):
        self.engine, self.left, self.closed = engine, 0, False

    def begin_turn(self, ids, turn):
        self.ids, self.left = list(ids), turn.count
        self.engine.waiting.append(self)

    def close(self):
        self.closed = True


class Engine:
    """Says a token of at most two requests a run, as a batch that is answered before another begins."""

    def __init__(self, _):
        self.waiting, self.active, self.most = [], [], 0

    def create_event_buffer(self, _):
        return None

    def create_request(self, options):
        assert options.session == 5
        return Request(self)

    def run(self, _):
        self.most = max(self.most, len(self.waiting) + len(self.active))
        if not self.active:
            self.active, self.waiting = self.waiting[:2], self.waiting[2:]
        events = []
        for request in self.active:
            request.left -= 1
            events.append(types.SimpleNamespace(request=request, flags=1 | (2 if request.left == 0 else 0)))
        self.active = [request for request in self.active if request.left]
        return events


class Options:
    def __init__(self, *_):
        self.most = self.least = None

    def set_max_session_tokens(self, count):
        self.session = count

    def set_max_generated_tokens(self, count):
        self.most = count

    def set_min_generated_tokens(self, count):
        self.least = count

    def set_do_sample(self, sampled):
        assert sampled is False

    @property
    def count(self):
        assert self.most == self.least
        return self.most


class Parameters:
    def __init__(self, _):
        self.chosen = {}

    def set_search_options(self, **chosen):
        assert chosen["min_length"] == chosen["max_length"] and chosen["do_sample"] is False
        self.chosen = chosen


class Generator:
    groups: list = []  # noqa: RUF012

    def __init__(self, _, parameters):
        self.chosen = parameters.chosen

    def append_tokens(self, ids):
        self.groups.append((self.chosen["batch_size"], ids.shape))

    def generate_next_token(self):
        pass

    def get_next_tokens(self):
        return [1] * self.chosen["batch_size"]


@pytest.fixture
def worker(monkeypatch):
    library = types.ModuleType("onnxruntime_genai")
    library.Engine, library.RequestOptions, library.TurnOptions = Engine, Options, Options
    library.GeneratorParams, library.Generator = Parameters, Generator
    library.EngineEventFlags = types.SimpleNamespace(TOKEN=1, TURN_FINISHED=2, FAILED=4)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", library)
    monkeypatch.delitem(sys.modules, "serve_genai", raising=False)
    import serve_genai

    yield serve_genai
    monkeypatch.delitem(sys.modules, "serve_genai", raising=False)


QUESTIONS = [([1, 2, 3], 2)] * 5


def test_the_engine_has_as_many_requests_as_there_are_clients_until_all_are_answered(worker):
    way = worker.Engine(None)
    answers = way.ask(QUESTIONS, 4)
    assert [(one["tokens"], one["prompt_tokens"], len(one["between"])) for one in answers] == [(2, 3, 1)] * 5
    assert way.engine.most == 4


def test_a_failure_of_the_engine_is_not_an_answer(worker, monkeypatch):
    failed = types.SimpleNamespace(request=None, flags=4, error_code="E")
    way = worker.Engine(None)
    monkeypatch.setattr(
        way.engine,
        "run",
        lambda _: [types.SimpleNamespace(**(vars(failed) | {"request": way.engine.waiting[0]}))],
    )
    with pytest.raises(RuntimeError, match="the engine failed: E"):
        way.ask(QUESTIONS, 1)


def test_a_batch_is_as_many_questions_as_there_are_clients_and_the_rest(worker):
    Generator.groups.clear()
    answers = worker.Batch(None).ask(QUESTIONS, 4)
    assert len(answers) == 5 and {one["tokens"] for one in answers} == {2}
    assert Generator.groups == [(4, (4, 3)), (1, (3,))]


def test_a_batch_of_several_lengths_is_refused(worker):
    with pytest.raises(ValueError, match=r"these have \[2, 3\]"):
        worker.Batch(None).ask([([1, 2], 2), ([1, 2, 3], 2)], 2)


def pruned():
    """The end of a graph of genai's builder, with the choice of the last position."""
    node, info, kind = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        node("Identity", ["x"], ["norm"], "norm"),
        node("Gather", ["norm", "last"], ["row"], "/lm_head/prune/Gather", axis=1),
        node("Unsqueeze", ["row", "one"], ["rows"], "/lm_head/prune/Unsqueeze"),
        node("MatMul", ["rows", "weight"], ["logits"], "/lm_head/MatMul"),
    ]
    values = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (("last", -1), ("one", [1]))]
    values.append(onnx.numpy_helper.from_array(np.ones((4, 5), np.float32), "weight"))
    inner = [info("rows", kind, ["batch_size", 1, 4])]
    outputs = [info("logits", kind, ["batch_size", 1, 5])]
    inputs = [info("x", kind, ["batch_size", "sequence_length", 4])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, values, value_info=inner)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


def test_the_engines_graph_gives_logits_of_all_positions_with_the_same_weights(tmp_path):
    import genai_engine
    import onnxruntime

    source = tmp_path / "source"
    source.mkdir()
    onnx.save(pruned(), source / "model.onnx")
    (source / "genai_config.json").write_text("{}")
    genai_engine.write(source, tmp_path / "made")
    assert (tmp_path / "made" / "genai_config.json").read_text() == "{}"
    onnx.checker.check_model(onnx.load(tmp_path / "made" / "model.onnx"), full_check=True)
    given = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    whole, last = (
        onnxruntime.InferenceSession(path / "model.onnx").run(None, {"x": given})[0]
        for path in (tmp_path / "made", source)
    )
    assert whole.shape == (2, 3, 5) and np.array_equal(whole[:, -1:], last)
    with pytest.raises(ValueError, match="has no /lm_head/prune/Unsqueeze"):
        genai_engine.write(tmp_path / "made", tmp_path / "again")
    assert not (tmp_path / "again").exists()
