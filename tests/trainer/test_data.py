"""Data: what is read, how it is split, and that a prepared entry heals."""

import collections
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import sysconfig
import time

import numpy as np
import pytest

from trainer import data as td
from trainer.data import stdlib, store, synthetic
from trainer.data.cli import DataRequest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(folder: pathlib.Path, contents: dict[str, bytes]) -> pathlib.Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _file(paths, **more):
    return td.load(DataRequest("file", paths=tuple(str(path) for path in paths), **more))


# --- stdlib -------------------------------------------------------------------------------------------------------


def test_stdlib_is_the_source_of_this_python_split_by_file():
    dataset = td.load(DataRequest("stdlib"))
    assert dataset.vocab_size == 256 and dataset.train.dtype == np.uint8 and dataset.bytes_per_token == 1.0
    assert 10e6 < dataset.train.size < 60e6
    assert 0.02 < dataset.validation.size / dataset.train.size < 0.10
    text = dataset.train.tobytes() + b"|" + dataset.validation.tobytes()
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py", "asyncio/tasks.py"):
        assert text.count((root / name).read_bytes()) == 1
    assert isinstance(dataset.train, np.memmap) and not dataset.train.flags.writeable


def test_stdlib_second_load_takes_milliseconds():
    first = td.load(DataRequest("stdlib"))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        again = td.load(DataRequest("stdlib"))
        took.append(time.perf_counter() - start)
    assert min(took) < 0.02
    assert again.sha256 == first.sha256


def test_stdlib_rule_on_a_small_tree(tmp_path):
    root = _write(
        tmp_path,
        {
            "b.py": b"b", "a.py": b"a", "pkg/c.py": b"c", "pkg/twin.py": b"a", "notes.txt": b"no",
            "site-packages/x.py": b"no", "__pycache__/y.py": b"no", "_sysconfigdata_linux.py": b"no",
            "config-3.11/z.py": b"no", "pkg/config-kept/k.py": b"k",
        },
    )  # fmt: skip
    assert stdlib.source_files(root) == ["a.py", "b.py", "pkg/c.py", "pkg/config-kept/k.py", "pkg/twin.py"]


def test_a_file_keeps_its_side_when_the_fraction_grows():
    names = [f"m{i}.py" for i in range(4000)]
    small = {name for name in names if stdlib.in_validation(name, 0.05)}
    large = {name for name in names if stdlib.in_validation(name, 0.2)}
    assert small < large
    # binomial(4000, 0.05): 200 +- 5 * 13.8
    assert 131 < len(small) < 269


# --- files --------------------------------------------------------------------------------------------------------


def test_few_files_are_split_by_position_and_duplicates_dropped(cache, tmp_path):
    folder = _write(tmp_path / "t", {"a.txt": b"a" * 60, "b.txt": b"b" * 40, "z.txt": b"a" * 60})
    dataset = _file([folder], validation_fraction=0.25)
    assert dataset.train.tobytes() == b"a" * 60 + b"b" * 15
    assert dataset.validation.tobytes() == b"b" * 25


def test_many_files_are_split_whole(cache, tmp_path):
    contents = {f"f{i}.txt": bytes([i]) * (50 + i) for i in range(40)}
    dataset = _file([_write(tmp_path / "t", contents)], validation_fraction=0.1)
    counts = {side: collections.Counter(getattr(dataset, side).tolist()) for side in ("train", "validation")}
    assert not counts["train"].keys() & counts["validation"].keys()
    assert counts["train"] + counts["validation"] == {i: 50 + i for i in range(40)}
    total = sum(50 + i for i in range(40))
    assert 0 < dataset.validation.size <= 0.1 * total
    moved = _file([_write(tmp_path / "elsewhere", contents)], validation_fraction=0.1)
    assert moved.sha256 == dataset.sha256


def test_one_huge_file_among_many_stays_in_train(cache, tmp_path):
    contents = {f"f{i}.txt": b"%d" % i for i in range(30)} | {"huge.txt": b"x" * 100_000}
    dataset = _file([_write(tmp_path / "t", contents)], validation_fraction=0.05)
    assert b"x" not in dataset.validation.tobytes() and dataset.validation.size > 0


def test_paths_may_be_files_folders_and_globs(cache, tmp_path, monkeypatch):
    folder = _write(tmp_path / "t", {"b.md": b"2" * 20, "a.txt": b"1" * 20, "deep/c.md": b"3" * 20, ".git/d.md": b"4" * 20})
    monkeypatch.chdir(tmp_path)
    whole = _file(["t"])
    assert whole.train.tobytes() + whole.validation.tobytes() == b"1" * 20 + b"2" * 20 + b"3" * 20
    globbed = _file(["t/**/*.md", folder / "a.txt", "t/b.md"])
    assert globbed.train.tobytes() + globbed.validation.tobytes() == b"2" * 20 + b"3" * 20 + b"1" * 20


def test_changed_file_is_prepared_again(cache, tmp_path):
    path = _write(tmp_path / "t", {"a.txt": b"a" * 100}) / "a.txt"
    before = _file([path])
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(1, 1))
    after = _file([path])
    assert set(after.train.tobytes()) == {ord("b")} and after.sha256 != before.sha256


@pytest.fixture
def tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, für Elise\n"] * 50, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_ids_decode_to_the_text(cache, tmp_path, tokenizer_json):
    import tokenizers

    text = "the lazy fox, über die quick Brücke\n" * 40_000  # more than one piece of a megabyte
    path = _write(tmp_path / "t", {"a.txt": text.encode()}) / "a.txt"
    dataset = _file([path], tokenizer=str(tokenizer_json), validation_fraction=0.1)
    oracle = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert dataset.train.dtype == np.uint16 and dataset.vocab_size == oracle.get_vocab_size()
    decoded = [oracle.decode(part.tolist()) for part in (dataset.train, dataset.validation)]
    assert "".join(decoded) == text
    assert dataset.bytes_per_token == pytest.approx(len(decoded[1].encode()) / dataset.validation.size, rel=1e-12)
    assert len(decoded[1].encode()) / len(text.encode()) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("fraction", [0.1, 0.17, 0.23, 0.31, 0.5])
def test_the_cut_never_falls_inside_a_character(cache, tmp_path, fraction):
    path = _write(tmp_path / "t", {"a.txt": "aé€😀".encode() * 7}) / "a.txt"
    dataset = _file([path], validation_fraction=fraction)
    assert dataset.train.tobytes().decode() + dataset.validation.tobytes().decode() == "aé€😀" * 7


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "stdlibb"}, ["data.name='stdlibb'", "file, stdlib, synthetic"]),
        ({"name": "file"}, ["data.paths is empty"]),
        ({"name": "file", "paths": ("nowhere/*.txt",)}, ["data.paths='nowhere/*.txt'", "matches no file"]),
        ({"name": "file", "paths": ("a.txt",), "tokenizer": "no.json"}, ["data.tokenizer='no.json'", "tokenizer.json"]),
        ({"name": "file", "paths": ("a.txt",), "tokenizer": "a.txt"}, ["data.tokenizer='a.txt'", "not a tokenizer.json"]),
        ({"name": "file", "paths": ("latin.txt",), "tokenizer": "good.json"}, ["latin.txt", "not UTF-8"]),
        ({"name": "file", "paths": ("empty.txt",)}, ["part is empty"]),
        ({"validation_fraction": 0.0}, ["data.validation_fraction=0.0", "between 0 and 1"]),
        ({"validation_fraction": 1.0}, ["data.validation_fraction=1.0", "between 0 and 1"]),
        ({"order": 0}, ["data.order=0"]),
        ({"vocab_size": 1}, ["data.vocab_size=1"]),
        ({"vocab_size": 256, "order": 3}, ["data.vocab_size=256", "order=3", "at most"]),
        ({"tokens": 1}, ["data.tokens=1"]),
        ({"seed": -1}, ["data.seed=-1"]),
    ],
)
def test_bad_requests_are_refused_in_one_line_and_leave_nothing(cache, tmp_path, monkeypatch, change, words, request):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, {"a.txt": b"text", "latin.txt": "Brücke".encode("latin-1"), "empty.txt": b""})
    if change.get("tokenizer") == "good.json":
        request.getfixturevalue("tokenizer_json").rename("good.json")
    with pytest.raises(ValueError) as caught:
        td.load(dataclasses.replace(DataRequest("synthetic", tokens=1000), **change))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)
    assert not cache.exists() or not list((cache / "data").iterdir())


def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path / "a file"))
    with pytest.raises(ValueError, match="BITLAW_CACHE=.*cannot be written"):
        td.load(DataRequest("synthetic", tokens=100))


def test_plugins_register_by_name():
    from trainer.data import registry

    @td.register("mine-for-this-test")
    def load(data):
        return data.name

    try:
        assert td.load(DataRequest("mine-for-this-test")) == "mine-for-this-test"
        with pytest.raises(ValueError, match="already registered"):
            td.register("mine-for-this-test")(lambda data: None)
    finally:
        del registry._loaders["mine-for-this-test"]


# --- the store ----------------------------------------------------------------------------------------------------


def _small() -> DataRequest:
    return DataRequest("synthetic", tokens=5000, vocab_size=8)


def test_the_hash_is_that_of_the_content(cache):
    dataset = td.load(_small())
    streams = [(part.size, hashlib.sha256(part.tobytes()).hexdigest()) for part in (dataset.train, dataset.validation)]
    assert dataset.sha256 == hashlib.sha256(json.dumps(["uint8", 8, streams]).encode()).hexdigest()
    assert td.load(dataclasses.replace(_small(), seed=1)).sha256 != dataset.sha256
    assert td.load(dataclasses.replace(_small(), validation_fraction=0.06)).sha256 != dataset.sha256


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_entry_is_prepared_again(cache, capsys, name, damage):
    dataset = td.load(_small())
    content = dataset.train.tobytes()
    path = dataset.folder / name
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    again = td.load(_small())
    assert again.train.tobytes() == content and again.sha256 == dataset.sha256
    assert "damaged" in capsys.readouterr().err or (name, damage) == ("meta.json", "delete")
    assert [entry.name for entry in (cache / "data").iterdir()] == [dataset.folder.name]


def test_a_copied_cache_is_kept(cache, monkeypatch):
    dataset = td.load(_small())
    for path in dataset.folder.iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(synthetic, "_prepare", lambda data: pytest.fail("was prepared again"))
    assert td.load(_small()).sha256 == dataset.sha256
    monkeypatch.setattr(store, "_sha256_of", lambda path: pytest.fail("was hashed again"))
    td.load(_small())


def _load_in_process(barrier, results):
    barrier.wait()
    results.put(td.load(_small()).sha256)


def test_processes_that_prepare_at_once_agree(cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_load_in_process, args=(barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    digests = {results.get(timeout=240) for _ in processes}
    for process in processes:
        process.join()
    assert digests == {td.load(_small()).sha256}
    assert len(list((cache / "data").iterdir())) == 1


# --- synthetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size, order", [(2, 1), (2, 5), (5, 3), (64, 1), (200, 1), (40, 2)])
def test_entropy_is_that_of_the_data(cache, vocab_size, order):
    request = DataRequest("synthetic", vocab_size=vocab_size, order=order, tokens=400_000, seed=3)
    dataset = td.load(request)
    source = synthetic.make_source(vocab_size, order, 3)
    tokens = np.concatenate([dataset.train, dataset.validation]).astype(np.int64)
    assert tokens.size == 400_000
    context = sum(tokens[order - 1 - i : tokens.size - 1 - i] * vocab_size**i for i in range(order))
    loss = -np.log(source.probabilities_CV[context, tokens[order:]])
    # Block means take the correlation along the chain into account.
    blocks = loss[: loss.size // 200 * 200].reshape(200, -1).mean(axis=1)
    std_err = blocks.std(ddof=1) / math.sqrt(200)
    assert 0.0 < std_err < 0.01
    assert abs(blocks.mean() - dataset.entropy_nats) < 4 * std_err


@pytest.mark.parametrize("vocab_size, order", [(2, 4), (7, 2), (30, 1)])
def test_stationary_law_and_entropies_against_linear_algebra(vocab_size, order):
    source = synthetic.make_source(vocab_size, order, 0)
    p_CV = source.probabilities_CV
    num_contexts = vocab_size**order
    matrix = np.zeros((num_contexts, num_contexts))
    for context in range(num_contexts):
        for token in range(vocab_size):
            matrix[context, (context * vocab_size + token) % num_contexts] += p_CV[context, token]
    values, vectors = np.linalg.eig(matrix.T)
    oracle = np.real(vectors[:, np.argmax(np.real(values))])
    oracle /= oracle.sum()
    pi_C = synthetic.stationary(source)
    np.testing.assert_allclose(pi_C, oracle, atol=1e-12)
    rate = -sum(pi_C[c] * p * math.log(p) for c in range(num_contexts) for p in p_CV[c] if p)
    found = synthetic.entropies(source, pi_C)
    assert found[-1] == pytest.approx(rate, rel=1e-12)
    assert len(found) == order and list(found) == sorted(found, reverse=True)


def test_lanes_draw_what_a_loop_over_tokens_draws():
    source = synthetic.make_source(3, 2, 7)
    pi_C = synthetic.stationary(source)
    fast = synthetic.sample(source, pi_C, 7, 5000)
    raw = np.random.PCG64(np.random.SeedSequence([7, 1])).random_raw(6001)
    context = int(np.searchsorted(np.cumsum(pi_C), (int(raw[0]) >> 11) / 2**53))
    slow = []
    for word in raw[1:5001]:
        token = int((source.cumulative_CV[context] <= (int(word) >> 32)).sum())
        slow.append(token)
        context = (context * 3 + token) % 9
    assert fast.tolist() == slow


def test_irreducible_loss_counts_the_short_contexts(cache):
    dataset = td.load(DataRequest("synthetic", vocab_size=4, order=3, tokens=1000))
    h1, h2, h3 = dataset.context_entropies
    assert dataset.irreducible_loss(10) == pytest.approx((h1 + h2 + 8 * h3) / 10)
    assert dataset.irreducible_loss(2) == pytest.approx((h1 + h2) / 2)
    assert td.load(DataRequest("stdlib")).irreducible_loss(10) is None


def test_synthetic_tokens_of_a_seed_stay_what_they_are(cache):
    dataset = td.load(DataRequest("synthetic", vocab_size=16, order=2, tokens=1000, seed=5))
    assert dataset.train[:12].tolist() == GOLDEN_TOKENS
    assert dataset.entropy_nats == pytest.approx(GOLDEN_ENTROPY, rel=1e-13)


GOLDEN_TOKENS = [6, 13, 12, 10, 6, 3, 0, 9, 15, 12, 15, 7]
GOLDEN_ENTROPY = 2.1155071352019217


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_what_and_where(cache, capsys):
    assert td.prepare(["synthetic", "--tokens", "1000", "--vocab-size", "4"]) == 0
    shown = capsys.readouterr().out
    dataset = td.load(DataRequest("synthetic", tokens=1000, vocab_size=4))
    for part in ("synthetic", "950 tokens (uint8)", "50 tokens", dataset.sha256, str(dataset.folder)):
        assert part in shown


@pytest.mark.parametrize("argv", [[], ["synthetic", "--tokens", "many"], ["synthetic", "--colour", "red"], ["nothing"]])
def test_the_command_refuses_in_one_line(cache, argv):
    with pytest.raises(ValueError) as caught:
        td.prepare(argv)
    assert "\n" not in str(caught.value)


def test_the_command_prepares_what_training_opens():
    import yaml

    written = yaml.safe_load((pathlib.Path(store.__file__).parents[2] / "configs/data/synthetic.yaml").read_text())
    default = DataRequest("synthetic")
    assert {key: getattr(default, key) for key in written if key != "defaults"} == {k: v for k, v in written.items() if k != "defaults"}
