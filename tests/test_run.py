"""``tqai run``: the mini, a tiny random Qwen2 in a folder, tiny diffusers pipelines in folders, and bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tqai_core as tqai
from tqai_core import run as run_module
from tqai_core.cli import main
from tqai_core.metrics import psnr, ssim
from tqai_core.peak import Peak
from tqai_core.report import dumps

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("--bits-k", "4", "--bits-v", "4", "--sink", "2", "--recent", "8")
FIXED = ("--monitor", "fixed:interval=2")  # a random net moves too wildly for error control to skip


def ask(capsys, *argv):
    """Exit status and the JSON of a run."""
    status = main(["run", *map(str, argv), "--json"])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON")), out.err


def refused(capsys, *argv):
    assert main(["run", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("tqai: ")
    return error


# -- language models


def test_the_demo_streams_and_counts_in_a_process_of_its_own(tmp_path):
    target = tmp_path / "r.json"
    command = [sys.executable, "-m", "tqai_core", "run", "def main(", "--demo", *PLAIN, "--max-tokens", "300", f"--json={target}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    assert done.stdout.startswith(result["text"].rstrip("\n")[:40])
    assert "tokens/s" in done.stdout
    assert result["kind"] == "lm"
    assert f"tokens/s on {result['processor']}" in done.stdout
    assert result["prompt_tokens"] == 9
    assert result["new_tokens"] == len(result["tokens"]) == 300
    assert result["text"] == bytes(result["tokens"]).decode("utf-8", "replace")
    assert len(result["text"].split()) > 20, "greedy text would be blanks"
    assert result["tokens_per_second"] == pytest.approx(299 / result["seconds_decode"])
    cache = result["cache"]
    assert cache["tokens"] == 308  # the last token is never read
    assert cache["tokens_packed"] >= 256 - 2 - 8
    assert cache["bytes_16bit"] == 4 * 2 * 2 * 64 * 308 * 2  # layers, k and v, heads, channels, tokens, bytes
    assert cache["bytes_held"] < 0.45 * cache["bytes_16bit"]
    assert cache["bytes_peak"] >= cache["bytes_held"]
    assert result["peak"]["how"]
    assert tqai.Config.from_dict(result["config"]).recent == 8
    assert set(tqai.Report().to_dict()) == set(result["report"])


def test_an_exact_cache_gives_the_exact_run(capsys):
    result, _ = ask(capsys, "import os", "--demo", "--codec", "exact", "--max-tokens", 60, "--compare")
    other = result["compare"]
    assert other["tokens"] == result["tokens"]
    assert other["first_difference"] is None
    assert other["kl_mean"] == other["kl_max"] == 0
    assert other["kl_tokens"] == 60
    assert result["cache"]["bytes_held"] == other["cache"]["bytes_held"] == 2 * other["cache"]["bytes_16bit"]  # fp32


def test_compare_reports_what_the_cache_changes(capsys, tmp_path):
    text = "def read(path):\n    with open(path) as f:\n        return f.read()\n\n" * 8
    runs = {}
    for bits in ("4", "2"):
        runs[bits], told = ask(capsys, text, "--demo", "--bits-k", bits, "--bits-v", bits, "--recent", 0, "--compare", "--max-tokens", 90)
        assert runs[bits]["text"][:10] in told, "the words go to stderr where JSON has stdout"
    four, two = (runs[bits]["compare"] for bits in ("4", "2"))
    assert 0 < four["kl_mean"] < two["kl_mean"] < 1
    assert four["kl_mean"] <= four["kl_max"]
    assert four["tokens"] == two["tokens"], "the exact run is the same"
    at = two["first_difference"]
    mine = runs["2"]["tokens"]
    assert mine != two["tokens"]
    assert mine[:at] == two["tokens"][:at]
    assert mine[at] != two["tokens"][at]
    assert runs["2"]["cache"]["bytes_held"] < runs["4"]["cache"]["bytes_held"]


def test_divergence_is_that_of_one_plain_pass():
    """Block by block through a cache, the distributions are those of the whole text at once."""
    from transformers import DynamicCache

    from tqai_core.hosts.transformers.run import divergence
    from tqai_core.minis import lm, lm_text

    model, whole = lm(), lm_text()[None, :200]

    class Hotter(DynamicCache):
        """Values a little larger: a change whose KL can be had without a cache too."""

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values * 1.05

    with torch.no_grad():
        got = divergence(model, whole, 40, Hotter(config=model.config))
        p = model(whole[:, :-1]).logits[0, 39:].log_softmax(-1)
        q = model(whole[:, :-1], past_key_values=Hotter(config=model.config)).logits[0, 39:].log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1)
    assert got.shape == (160,)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)
    assert wanted.mean() > 1e-4


def test_methods_at_level_kv_go_through(capsys):
    """The options reach the cache: sites say what scorer, strategy and monitor did."""
    text = "def read(path):\n    with open(path) as f:\n        return f.read()\n\n" * 6
    stages = ("--scorer", "palm", "--strategy", "delta", "--monitor", "stability", "--skip-layers", "0,1", "--recent", 8)
    result, _ = ask(capsys, text, "--demo", *stages, "--max-tokens", 40, "--compare")
    config = tqai.Config.from_dict(result["config"])
    assert (config.scorer, config.strategy, config.monitor, config.skip_layers) == ("palm", "delta", "stability", (0, 1))
    assert list(result["report"]["per_site"]) == ["attn.2", "attn.3"]
    assert 0 < result["compare"]["kl_mean"] < 0.1
    assert any("packing starts at 256 tokens and saves time from some 4,000 on" in text for text in result["warnings"])


def test_a_folder_with_a_chat_template(capsys, lm_folder):
    chat, _ = ask(capsys, "hello", "-m", lm_folder, "--max-tokens", 5)
    plain, _ = ask(capsys, "hello", "-m", lm_folder, "--max-tokens", 5, "--no-chat")
    assert plain["prompt_tokens"] == 5
    assert chat["prompt_tokens"] == len("<user>hello<assistant>")
    assert chat["temperature"] is None
    assert "nothing is packed yet" in chat["warnings"][0]


def test_a_folder_packs_compares_and_keeps_its_seed(capsys, lm_folder):
    long = "x = 1\n" * 60
    argv = (long, "-m", lm_folder, *PLAIN, "--skip-layers", "0", "--max-tokens", 40, "--temperature", "1.5", "--seed", 3)
    first, _ = ask(capsys, *argv, "--compare", "--dtype", "bfloat16")
    again, _ = ask(capsys, *argv, "--dtype", "bfloat16")
    assert first["tokens"] == again["tokens"], "warming up and comparing change nothing"
    assert first["dtype"] == "bfloat16"
    assert list(first["report"]["per_site"]) == ["attn.1"]
    assert {"where": "attn.0", "why": "skip_layers"} in first["report"]["fallbacks"]
    length = first["cache"]["tokens"]
    assert first["cache"]["bytes_16bit"] == 2 * 2 * 2 * 16 * length * 2  # of both layers, the exact one too
    assert first["compare"]["kl_mean"] > 0
    other, _ = ask(capsys, *argv[:-1], 4, "--dtype", "bfloat16")
    assert other["tokens"] != first["tokens"]


def test_a_model_without_rotary_positions_and_with_a_cache_of_its_own_choice(capsys, tmp_path, byte_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None))
    model.generation_config.cache_implementation = "static"
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()  # the bar of saving
    assert "calibrate=0" in refused(capsys, "hi", "-m", tmp_path)
    result, _ = ask(capsys, "x" * 60, "-m", tmp_path, *PLAIN, "--calibrate", 0, "--max-tokens", 12, "--compare")
    assert result["cache"]["tokens_packed"] >= 32
    assert result["compare"]["kl_mean"] < 0.1


def test_turns_share_one_cache(capsys, lm_folder):
    """The second turn reads its own words alone."""
    options = ("-m", lm_folder, *PLAIN, "--max-tokens", 20, "--temperature", 0)
    first = "x = 1\n" * 60
    talk, _ = ask(capsys, first, "--then", "and y?", *options, "--system", "be brief")
    assert talk["turns"][0]["prompt_tokens"] == len(f"<system>be brief<user>{first}<assistant>")
    one, two = talk["turns"]
    assert one["tokens_read"] == one["prompt_tokens"]
    assert 0 < two["tokens_read"] < 60, "the tokens of the first turn are in the cache"
    assert talk["cache"]["tokens"] == two["prompt_tokens"] + talk["new_tokens"] - 1
    assert talk["cache"]["positions_left"] == 512 - two["prompt_tokens"] - talk["new_tokens"]
    assert two["tokens_read"] == len("<user>and y?<assistant>") + 1, "and the last token of the answer"
    raw, _ = ask(capsys, "abc", "--then", "def", *options, "--raw")
    assert raw["turns"][1]["prompt_tokens"] == 3 + 20 + 3
    assert raw["turns"][1]["tokens_read"] == 4, "the last token written was never read"


def test_what_a_cache_holds_beyond_the_common_text_is_forgotten():
    """A template that leaves the beginning of an answer out: the cache is cropped to what is common, and an exact one then writes what a
    new one does."""
    from transformers import DynamicCache

    from tqai_core.hosts.transformers.conversation import Conversation
    from tqai_core.hosts.transformers.loading import Bytes, Loaded
    from tqai_core.minis import lm

    class Shortens(Bytes):
        chat_template = "yes"

        def apply_chat_template(self, messages, **options):
            *before, last = messages
            return "".join(m["content"] if m["role"] == "user" else m["content"][5:] for m in before) + last["content"]

    loaded = Loaded(lm(), Shortens(), "mini")
    text = "def read(path):\n    with open(path) as f:\n        return f.read()\n\n" * 6
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cut = {}
    for name, config in (("packed", tqai.Config(level="kv", recent=8)), ("exact", tqai.Config(level="kv", codec="exact"))):
        with torch.no_grad(), tqai.apply(loaded.model, config) as handle:
            talk = Conversation(loaded, handle.cache(), True, options)
            answer = talk.ask(text)["text"]
            cut[name] = talk.ask("def write(")
            whole = Conversation(loaded, DynamicCache(config=loaded.model.config), False, options)
            want = whole.ask(text + answer[5:] + "def write(")
            assert cut[name]["prompt_tokens"] == want["prompt_tokens"] == talk.cache.get_seq_length() - 11
    assert cut["exact"]["tokens"] == want["tokens"]
    assert len(text) + len("def write(") < cut["packed"]["prompt_tokens"]
    assert cut["packed"]["tokens_read"] <= 12 - 5 + len("def write(")


def test_turns_are_typed_in_a_terminal(capsys, lm_folder, monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hello\nand you?\n\nnever\n"))
    assert main(["run", "-m", str(lm_folder), "--max-tokens", "4", "--temperature", "0"]) == 0
    told = capsys.readouterr().out
    assert told.count("> ") == 3, "an empty line ends it"
    assert told.count("tokens left]") == 2
    assert "of them held from the turns before" in told
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert "prompt is missing" in refused(capsys, "-m", lm_folder)
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert "nothing was asked" in refused(capsys, "-m", lm_folder)


def test_prompts_from_a_file_and_from_standard_input(capsys, lm_folder, tmp_path, monkeypatch):
    import io

    words = "x = 1\n"
    (tmp_path / "p.txt").write_text(words)
    options = ("-m", lm_folder, "--max-tokens", 3, "--temperature", 0, "--raw")
    here, _ = ask(capsys, words, *options)
    file, _ = ask(capsys, f"@{tmp_path / 'p.txt'}", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO(words))
    piped, _ = ask(capsys, "-", *options)
    assert here["tokens"] == file["tokens"] == piped["tokens"]
    at, _ = ask(capsys, "@@x", *options)
    assert at["prompt_tokens"] == 2
    assert "No such file" in refused(capsys, f"@{tmp_path / 'none.txt'}", "--demo")


def test_a_short_text_is_told_in_a_plain_sentence(capsys, lm_folder):
    assert main(["run", "hello", "-m", str(lm_folder), "--max-tokens", "4"]) == 0
    told = capsys.readouterr().out
    assert "all of them exact" in told
    assert "x as large" not in told
    assert (
        main(["run", "x = 1\n" * 14, "-m", str(lm_folder), "--max-tokens", "4", "--calibrate", "0", "--recent", "8", "--sink", "40"]) == 0
    )
    assert "no smaller, for its exact tokens weigh more" in capsys.readouterr().out


def test_a_gguf_file_and_its_folder(capsys, tmp_path, monkeypatch):
    """A tiny Llama written as GGUF runs as the same weights do in a folder of transformers."""
    import importlib.util

    gguf = pytest.importorskip("gguf")
    tiny_gguf(gguf, tmp_path / "tiny.gguf")
    options = ("--max-tokens", 12, "--temperature", 0, "--raw", *PLAIN, "--calibrate", 0)
    one, _ = ask(capsys, "ab" * 40, "-m", tmp_path / "tiny.gguf", *options, "--compare")
    two, _ = ask(capsys, "ab" * 40, "-m", tmp_path, *options)
    assert one["tokens"] == two["tokens"]
    assert one["cache"]["tokens_packed"] > 0
    assert one["compare"]["kl_mean"] < 0.1
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert "has 2 GGUF files" in refused(capsys, "hi", "-m", tmp_path)
    assert "cannot load" in refused(capsys, "hi", "-m", tmp_path / "other.gguf")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    assert "pip install 'tqai-core[gguf]'" in refused(capsys, "hi", "-m", tmp_path / "tiny.gguf")


def tiny_gguf(gguf, path):
    """A random Llama of 2 layers with 2 heads of 32 and a byte-level tokenizer, in the format of llama.cpp."""
    from tokenizers.pre_tokenizers import ByteLevel

    g, d = torch.Generator().manual_seed(0), 64
    words = sorted(ByteLevel.alphabet())
    words.append("".join(words[:2]))  # a merge
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (("context_length", 256), ("embedding_length", d), ("block_count", 2), ("feed_forward_length", 96),
                        ("head_count", 2), ("head_count_kv", 2), ("rope_dimension_count", 32), ("vocab_size", len(words))):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name, *shape):
        writer.add_tensor(name, (torch.randn(shape, generator=g) * shape[-1] ** -0.5).numpy())

    add("token_embd.weight", len(words), d)
    for i in range(2):
        for name, rows, columns in (("attn_q", d, d), ("attn_k", d, d), ("attn_v", d, d), ("attn_output", d, d),
                                    ("ffn_gate", 96, d), ("ffn_up", 96, d), ("ffn_down", d, 96)):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(d, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


def test_too_many_tokens_are_said(capsys, lm_folder):
    result, _ = ask(capsys, "x" * 505, "-m", lm_folder, "--no-chat", "--max-tokens", 10)
    assert any("512 positions" in text for text in result["warnings"])


def test_pipeline_files_and_options(tmp_path):
    file = tmp_path / "p.json"
    args = lambda **kw: _args(**{"pipeline": str(file), **kw})
    file.write_text(tqai.Config(level="kv", codec="turbo:bits_k=8,bits_v=4", sink=1).to_json())
    config = run_module.config_of(args(bits_k=2, recent=16, skip_layers="0,-1"), "kv")
    assert config == tqai.Config(level="kv", codec="turbo:bits_k=2,bits_v=4", sink=1, recent=16, skip_layers=(0, -1))
    file.write_text(json.dumps({"scorer": "palm", "strategy": "delta", "scorer_kwargs": {"alpha": 0.5}, "skip_layers": [0, 1]}))
    config = run_module.config_of(args(), "model")
    assert config == tqai.Config(scorer="palm:alpha=0.5", strategy="delta", skip_layers=(0, 1))
    config = run_module.config_of(args(scorer="snr", level="attention"), "model")
    assert (config.scorer, config.level) == ("snr", "attention"), "an option wins, the file's options of the old one go"
    assert run_module.config_of(_args(), "model") is None
    assert run_module.config_of(_args(), "kv") == tqai.Config(level="kv")
    assert run_module.config_of(_args(monitor="none"), "model").monitor is None
    inline = run_module.config_of(_args(pipeline='{"strategy": "delta"}'), "model")
    assert inline.strategy == "delta"


def _args(**kw):
    import argparse

    parser = argparse.ArgumentParser()
    run_module.arguments(parser)
    args = parser.parse_args(["p", "--demo"])
    vars(args).update(kw)
    return args


def test_bad_input_is_one_line_with_the_cure(capsys, lm_folder, tmp_path):
    say = lambda *argv: refused(capsys, *argv)
    assert "no such folder" in say("hi", "-m", "./nowhere")
    assert "no such folder" in say("hi", "-m", "/no/where/at/all")
    assert "cannot load no-such-org/no-such-model" in say("hi", "-m", "no-such-org/no-such-model")
    assert "neither config.json" in say("hi", "-m", tmp_path)
    (tmp_path / "f").write_text("")
    assert "is a file" in say("hi", "-m", tmp_path / "f")
    assert "prompt is empty" in say(" ", "--demo")
    assert "bits_k=7" in say("hi", "--demo", "--bits-k", 7)
    assert "recent=-1" in say("hi", "--demo", "--recent", "-1")
    assert "--max-tokens 0" in say("hi", "--demo", "--max-tokens", 0)
    assert "--temperature -1" in say("hi", "--demo", "--temperature", "-1")
    assert "skip layer 9 asked" in say("hi", "--demo", "--skip-layers", 9)
    assert "--device tpu9" in say("hi", "--demo", "--device", "tpu9")
    assert "--steps asked" in say("hi", "--demo", "--steps", 4)
    assert "no chat template" in say("hi", "--demo", "--chat")
    assert "no chat template is used" in say("hi", "--demo", "--system", "be brief")
    assert "prompt is empty" in say("hi", "--demo", "--then", " ")
    assert "about one turn" in say("hi", "--demo", "--then", "more", "--compare")
    assert "No such file" in say("hi", "--demo", "--pipeline", tmp_path / "none.json")
    (tmp_path / "f").write_text("{")
    assert "no JSON" in say("hi", "--demo", "--pipeline", tmp_path / "f")
    assert "level 'model'" in say("hi", "--demo", "--pipeline", '{"level": "model"}')
    assert "unknown nonsense" in say("hi", "--demo", "--pipeline", '{"nonsense": 1}')
    assert "unknown" in say("hi", "--demo", "--scorer", "nonsense")
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64))
    bert.save_pretrained(tmp_path / "bert")
    assert "no causal language model (BertForMaskedLM)" in say("hi", "-m", tmp_path / "bert")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((lm_folder / "config.json").read_text())
    assert "cannot load" in say("hi", "-m", tmp_path / "broken")
    assert main(["run", "hi"]) == 2
    assert main(["run", "hi", "--demo", "-m", str(lm_folder)]) == 2


def test_a_pipeline_on_the_hub_is_known_by_its_index(tmp_path, monkeypatch):
    """In the cache as downloads leave it, without the network: what has model_index.json is a pipeline, all else a language model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    for name, file in (("pictures", "model_index.json"), ("words", "config.json")):
        folder = tmp_path / f"models--someone--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / file).write_text("{}")
    assert run_module.is_pipeline("someone/pictures")
    assert not run_module.is_pipeline("someone/words")
    assert not run_module.is_pipeline("someone/nothing")


def test_a_missing_extra_is_named(capsys, monkeypatch, lm_folder):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else real(name, *a))
    assert "pip install 'tqai-core[transformers]'" in refused(capsys, "hi", "-m", lm_folder)


def test_json_has_null_for_what_is_no_number():
    text = dumps({"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf,)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": [None]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_is_what_was_needed_and_given_back():
    with Peak(torch.device("cpu")) as peak:
        block = torch.ones(64 << 18)  # 64 MiB
        del block
    assert 60 << 20 < peak.nbytes < 90 << 20
    with Peak(torch.device("cpu")) as peak:
        torch.ones(16)
    assert peak.nbytes < 4 << 20, "the mark of the first block is gone"


# -- diffusers pipelines


def wan(folder):
    """WanPipeline with random weights and a tiny UMT5."""
    import diffusers
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0)
    text = UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2))
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True])
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text, tokenizer=tokenizer)
    pipe.save_pretrained(folder)


def test_a_picture(capsys, picture_folder, tmp_path, monkeypatch):
    from PIL import Image

    from tqai_core.hosts.diffusers import run as host

    made, save = {}, host.save  # what is written, before it is rounded to 8 bits
    monkeypatch.setattr(host, "save", lambda pixels, folder, name, video: save(made.setdefault(name, pixels), folder, name, video))
    argv = ("a cat", "-m", picture_folder, "--steps", 18, "--height", 64, "--width", 64, "--out", tmp_path, "--seed", 5)
    result, _ = ask(capsys, *argv, *FIXED, "--compare")
    assert result["kind"] == "pipeline"
    assert result["pipeline"] == "StableDiffusion3Pipeline"
    assert tqai.Config.from_dict(result["config"]) == tqai.Config(monitor="fixed:interval=2")
    report, other = result["report"], result["compare"]
    assert report["evaluations"] == 18
    assert report["calls_skipped"] == 7, "three first and the last are computed, half of the rest"
    assert result["files"] == [str(tmp_path / "tqai-5.png")]
    assert other["files"] == [str(tmp_path / "exact-5.png")]
    assert Image.open(tmp_path / "tqai-5.png").size == (64, 64)
    assert not other["identical"]
    assert other["psnr"] > 20
    assert other["psnr_latents"] > 20
    ours, exact = (torch.from_numpy(made[f"{name}-5"]).movedim(-1, 1) for name in ("tqai", "exact"))
    assert other["psnr"] == pytest.approx(psnr(ours, exact))
    assert other["ssim"] == pytest.approx(ssim(ours, exact))
    assert other["largest"] == pytest.approx(float((ours - exact).abs().max() / (exact.max() - exact.min())))
    tenfold = (10 * (ours - exact).abs())[0].movedim(0, -1).clamp(0, 1) * 255
    assert np.array_equal(np.asarray(Image.open(tmp_path / "difference-5.png")), tenfold.round().byte().numpy())
    page = (tmp_path / "compare-5.html").read_text()
    assert other["page"] == str(tmp_path / "compare-5.html")
    assert [page.count(f'src="{name}-5.png"') for name in ("tqai", "exact", "difference")] == [2, 2, 1]
    assert f"<td>{other['psnr']:.1f} dB</td><td>{other['ssim']:.4f}</td>" in page
    assert page.count("<td>forecast</td>") == 7
    assert page.count("<svg") == 2, "for a wide and for a narrow page"
    assert main(["run", *map(str, argv), *FIXED]) == 0
    assert "7 of 18 model calls skipped (39%)" in capsys.readouterr().out


def test_a_run_that_skips_nothing_is_identical(capsys, picture_folder, tmp_path):
    argv = ("a cat", "-m", picture_folder, "--steps", 4, "--height", 64, "--width", 64, "--out", tmp_path, "--compare")
    result, _ = ask(capsys, *argv)
    assert tqai.Config.from_dict(result["config"]) == tqai.preset("balanced", "sd3")
    assert result["compare"]["identical"]
    assert result["compare"]["psnr"] is None
    assert any("nothing was skipped" in text for text in result["warnings"])


def test_a_video(capsys, tmp_path):
    from PIL import Image

    wan(tmp_path / "wan")
    argv = ("a cat", "-m", tmp_path / "wan", "--steps", 16, "--height", 32, "--width", 32, "--frames", 5, "--out", tmp_path / "out")
    result, _ = ask(capsys, *argv, *FIXED, "--video", "webp", "--negative", "dog", "--guidance", 3)
    assert result["report"]["calls"] == 32
    assert result["report"]["calls_skipped"] == 2 * 6
    assert result["files"] == [str(tmp_path / "out" / "tqai-0.webp")]
    clip = Image.open(result["files"][0])
    assert (clip.n_frames, clip.size) == (5, (32, 32))
    assert main(["run", *map(str, argv), "--video", "gif"]) == 0
    assert Image.open(tmp_path / "out" / "tqai-0.gif").size == (32, 32)


def test_bad_pipeline_input_is_one_line(capsys, picture_folder, tmp_path, monkeypatch):
    say = lambda *argv: refused(capsys, "a cat", "-m", picture_folder, "--out", tmp_path, *argv)
    assert "--bits-k asked" in say("--bits-k", 4)
    assert "takes no num_frames" in say("--frames", 5)
    assert "divisible" in say("--height", 63)
    assert "skip layer 7 asked" in say("--level", "attention", "--skip-layers", 7)
    assert "level 'kv'" in say("--pipeline", '{"level": "kv"}')
    from tqai_core.hosts.diffusers import run as pipe_run

    monkeypatch.setattr(pipe_run, "find_spec", lambda name: None)
    assert "--video mp4 needs imageio" in say("--video", "mp4")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    assert "cannot load" in refused(capsys, "a cat", "-m", tmp_path / "broken")
