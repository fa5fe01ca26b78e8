"""What `push_to_hub` pushes, `from_pretrained` loads: by name and revision, in a process without this package."""

import hashlib
import json

import pytest
import torch
import transformers
from clients import AUTO_CLASSES, IDS, assert_same, files_of, observe, run_program, run_stranger
from helpers import tiny_model
from loopback import STRANGER
from packaging.version import Version
from peft import PeftModel
from transformers import AutoTokenizer

import modeling_fire


TRUST = {"trust_remote_code": True}
CAUSAL = {"kind": "model", "auto_class": "AutoModelForCausalLM", "ids": IDS, **TRUST}


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict:
    """What the author pushed (see `owner.py`): `work`, with the folders, the `commits`, and the errors on the way."""
    work = tmp_path_factory.mktemp("owner")
    tiny_model(seed=7).save_pretrained(work / "interrupted")
    weights = hashlib.sha256((work / "interrupted" / "model.safetensors").read_bytes()).hexdigest()
    hub.faults = {
        f"PUT /lfs/models/owner/cut-upload/{weights}": "half",
        "POST /api/models/owner/cut-commit/commit/main": "half",
        "POST /api/models/owner/unanswered/commit/main": "unanswered",
    }
    run_program("owner.py", str(work), environment=hub.environment(work / "home"))
    commits, interrupted = torch.load(work / "pushed.pt")
    hub.repos["models/owner/gated"].gated = True
    return {"work": work, "commits": commits, "interrupted": interrupted}


@pytest.fixture(scope="module")
def found(hub, pushed, tmp_path_factory) -> dict[str, dict]:
    """What a stranger with a token of his own made of it."""
    jobs = {}
    for auto_class, model_class in AUTO_CLASSES.items():
        jobs[auto_class] = {**CAUSAL, "auto_class": auto_class, "source": f"owner/{model_class.__name__}"}
    commits = pushed["commits"]
    for revision in ("v1", "variant", "main", *commits.values()):
        jobs[revision] = {**CAUSAL, "source": "owner/model", "revision": revision}
    jobs |= {
        "code revision": {**CAUSAL, "source": "owner/model", "code_revision": commits["v1"]},
        "sharded": {**CAUSAL, "source": "owner/sharded"},
        "half": {**CAUSAL, "source": "owner/half", "dtype": "auto"},
        "device_map": {**CAUSAL, "source": "owner/model", "device_map": "auto"},
        "adapter": {**CAUSAL, "source": "owner/model", "revision": "v1", "adapter": "owner/adapter"},
        "adapter alone": {**CAUSAL, "source": "owner/adapter"},
        "copy": {**CAUSAL, "source": "owner/model", "push": "stranger/copy"},
        "copied": {**CAUSAL, "source": "stranger/copy"},
        "pipeline": {"kind": "pipeline", "source": "owner/model", "prompt": "A fire", "revision": "v1", **TRUST},
        "tokenizer": {"kind": "tokenizer", "source": "owner/model", "text": "A fire"},
        "dataset": {"kind": "dataset", "source": "owner/data"},
        "stream": {"kind": "dataset", "source": "owner/data", "streaming": True},
        "not trusted": {**CAUSAL, "source": "owner/model", "trust_remote_code": False},
        "not asked": {**CAUSAL, "source": "owner/model", "trust_remote_code": None},
        "private": {**CAUSAL, "source": "owner/private"},
        "gated": {**CAUSAL, "source": "owner/gated"},
        "missing": {**CAUSAL, "source": "owner/nothing"},
        "wrong revision": {**CAUSAL, "source": "owner/model", "revision": "v2"},
        "not his": {**CAUSAL, "source": "owner/model", "push": "owner/model"},
        "given": {**CAUSAL, "source": "owner/private", "token": "hf_owner"},
    }
    work = tmp_path_factory.mktemp("stranger")
    return run_stranger(work, jobs, hub.environment(work / "home", STRANGER))


def expected(name: str = "FireForCausalLM", **changes) -> dict[str, torch.Tensor]:
    return observe(tiny_model(getattr(modeling_fire, name), **changes), mask=None)


@pytest.mark.parametrize("name", ["FireModel", "FireForSequenceClassification", "half", "sharded", "adapter"])
def test_a_repository_is_the_saved_folder(hub, pushed, name):
    contents = hub.repos[f"models/owner/{name}"].contents()
    assert b"library_name:" in contents.pop("README.md")
    folder = files_of(pushed["work"] / name)
    folder.pop("README.md", None)
    assert contents == folder
    assert not any(path.endswith((".bin", ".pt", ".pkl")) for path in contents)


def test_the_tokenizer_goes_where_the_model_is(hub, pushed):
    contents = hub.repos["models/owner/model"].contents(pushed["commits"]["v1"])
    assert contents.items() >= files_of(pushed["work"] / "tokenizer").items()
    assert contents["README.md"]


def test_shards(hub, pushed, found):
    contents = hub.repos["models/owner/sharded"].contents()
    index = json.loads(contents["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {path for path in contents if path.endswith(".safetensors")}
    assert "model.safetensors" not in contents and len(set(index["weight_map"].values())) > 2
    assert_same(found["sharded"], expected())


@pytest.mark.parametrize("name", ["cut-upload", "cut-commit", "unanswered"])
def test_an_interrupted_push_is_repeated_without_harm(hub, pushed, name):
    """
    The connection breaks in the middle of an upload, which the client repeats by itself, in the middle of the commit,
    or after it.
    """
    assert not hub.faults
    errors = pushed["interrupted"][name]
    assert [error[0] for error in errors] == ([] if name == "cut-upload" else ["RemoteProtocolError"])
    repo = hub.repos[f"models/owner/{name}"]
    assert repo.contents() == files_of(pushed["work"] / "interrupted")
    assert len(repo.commits) == 2  # with the first, empty one


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_class_loads_by_name(found, auto_class):
    name = AUTO_CLASSES[auto_class].__name__
    result = found[auto_class]
    assert result["class"] == name and result["module"].startswith("transformers_modules.owner.")
    assert not result["missing"] and not result["unexpected"]
    assert_same(result, expected(name))


def test_revisions(pushed, found):
    """A tag, a branch, the main branch, and the commit of each: its weights, and its code."""
    for seed, name in enumerate(("v1", "variant", "main")):
        commit = pushed["commits"][name]
        for revision in (name, commit):
            assert commit in found[revision]["module"]
            assert_same(found[revision], expected(seed=seed))


def test_code_revision(pushed, found):
    """The latest weights with the code of another revision, such as one that was read through."""
    assert pushed["commits"]["v1"] in found["code revision"]["module"]
    assert_same(found["code revision"], expected(seed=2))


def test_dtypes(found):
    for parameter, dtype in found["half"]["dtypes"].items():
        assert dtype == (torch.float32 if "position_bias" in parameter else torch.bfloat16), parameter
    assert_same(found["half"], expected(dtype="bfloat16"))


def test_device_map(found):
    assert_same(found["device_map"], expected(seed=2))


def test_adapter(pushed, found):
    expected = PeftModel.from_pretrained(tiny_model(), pushed["work"] / "adapter").merge_and_unload()
    assert_same(found["adapter"], observe(expected, mask=None))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="5.17 leaves out `modules_to_save`, of any model"
)
def test_an_adapter_finds_its_base_model(pushed, found):
    """By the name that it was loaded by, in its latest revision."""
    expected = PeftModel.from_pretrained(tiny_model(seed=2), pushed["work"] / "adapter")
    assert_same(found["adapter alone"], observe(expected, mask=None))


def test_pipeline(pushed, found):
    tokenizer = AutoTokenizer.from_pretrained(pushed["work"] / "tokenizer")
    generate = transformers.pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    written = generate("A fire", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found["pipeline"]["text"] == written and len(written) > len("A fire")


def test_tokenizer_and_dataset(pushed, found):
    assert found["tokenizer"]["ids"] == AutoTokenizer.from_pretrained(pushed["work"] / "tokenizer")("A fire").input_ids
    for name in ("dataset", "stream"):
        assert found[name]["rows"] == [{"text": "A fire"}, {"text": "needs fuel."}], name


def test_a_stranger_passes_it_on(hub, pushed, found):
    """Loaded by its remote code and pushed: the same files, from which the next stranger loads."""
    copy, model = hub.repos["models/stranger/copy"].contents(), hub.repos["models/owner/model"].contents()
    code = {path: content for path, content in model.items() if path.endswith(".py")}
    assert copy.items() >= code.items()
    assert copy["model.safetensors"] == model["model.safetensors"]
    assert json.loads(copy["config.json"])["auto_map"] == json.loads(model["config.json"])["auto_map"]
    assert found["copied"]["module"].startswith("transformers_modules.stranger.copy.")
    assert_same(found["copied"], expected(seed=2))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("not trusted", "ValueError", "pass the argument `trust_remote_code=True`"),
        ("not asked", "ValueError", "pass the argument `trust_remote_code=True`"),
        ("private", "OSError", "is not a valid model identifier"),
        ("missing", "OSError", "is not a valid model identifier"),
        ("gated", "OSError", "You are trying to access a gated repo"),
        ("wrong revision", "OSError", "v2 is not a valid git identifier"),
        ("not his", "HfHubHTTPError", "403 Forbidden"),
    ],
)
def test_what_is_not_allowed_is_an_error_of_transformers(found, name, error, message):
    assert error in found[name]["error"]
    assert message in found[name]["message"]


def test_a_private_model_needs_a_token_of_its_owner(found):
    assert_same(found["given"], expected())
