"""Packed prefixes in real engines: closeness by logits, damage, eviction, preemption, chunks, another engine, the server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from bench import vllm as scenes
from bench.vllm_engine import connector

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 128


@pytest.fixture(scope="session")
def damage(folder):
    return scenes.play("vllm_play", "damage", folder)


@pytest.fixture(scope="session")
def small(damage, folder):
    """After ``damage``: a second engine on its folder."""
    return scenes.play("vllm_play", "small", folder)


@pytest.fixture(scope="session")
def below(tmp_path_factory):
    return scenes.play("vllm_play", "below", tmp_path_factory.mktemp("tier"))


def test_a_prefix_is_restored(damage):
    assert damage["cold_cached"] == 0
    assert damage["packed_cached"] == 6 * BLOCK
    assert damage["blocks"] == 6


def test_every_kind_of_damage_is_noticed_and_computed_again_bit_for_bit(damage):
    rows = damage["rows"]
    assert len({row["kind"] for row in rows}) == 12
    assert {row["at"] for row in rows} == {0, 2}
    assert [row for row in rows if row["noticed"] != 1] == []
    assert [row for row in rows if row["largest_difference"] > 0 or row["wrong_tokens"]] == []


def test_a_step_whose_load_failed_stores_nothing(damage):
    assert [row for row in damage["rows"] if row["failed_step_blocks"]] == []


def test_a_second_engine_finds_the_first_ones_blocks(small):
    assert small["shared_cached"] == 6 * BLOCK


def test_prompts_that_are_read_in_chunks_are_stored_whole(small):
    assert small["chunks"] >= 3
    assert small["chunk_cached"] == 9 * BLOCK
    assert small["chunk_kl"] < 0.01


def test_preempted_requests_store_what_they_would_have_alone(small):
    assert small["preempted"] > 0
    assert small["preempted_tokens"] == [120] * 4
    assert small["preempted_blocks"] == small["alone_blocks"] == 20
    assert small["preempted_nmse"] < 0.02


def test_blocks_that_vanish_and_break_under_way_do_no_harm(small):
    assert small["evicted_lost"] > 0
    assert small["evicted_cached"] > 0
    assert small["evicted_kl"] < 0.02
    assert small["bound"] <= 1
    assert small["thrown_out"] > 0


def test_the_tier_below_vllms_offloading_restores_within_the_same_error(below):
    assert below["saved"] == 8
    assert below["cached"] == 8 * BLOCK
    assert below["kl"] < 0.01


def test_damaged_chunks_of_the_tier_are_computed_again_and_stored_again(below):
    assert below["damaged_cached"] == 0
    assert below["damaged_equal"]
    assert below["healed_cached"] == 8 * BLOCK


def test_the_metrics_of_the_tier_count_what_happened(below):
    counts = {name.removeprefix("vllm:tqai_tier_"): value for name, value in below["metrics"].items()}
    assert counts["refused"] >= 1, "vLLM gives a prefix up at its first miss"
    assert counts["loaded"] >= 16
    assert counts["saved"] >= 8 + counts["refused"]
    assert 3.4 < counts["saved"] * 128 * 23_040 / counts["saved_bytes"] < 4
    assert counts["decode_seconds"] > 0


class Server:
    """vLLM's OpenAI server on this machine alone."""

    def __init__(self, store: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(scenes.MODEL), "--served-model-name", "lm",
            "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "2048",
            "--max-num-seqs", "2", "--kv-cache-memory-bytes", str(128 << 20), "--kv-transfer-config", json.dumps(connector(store)),
        ]  # fmt: skip
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, cwd=tempfile.gettempdir(), env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + 300
        while time.monotonic() < end:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise TimeoutError(Path(self.log.name).read_text()[-3000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def complete(self, text: str) -> str:
        body = json.dumps({"model": "lm", "prompt": text, "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["text"]

    def hits(self) -> float:
        found = re.findall(r"^vllm:external_prefix_cache_hits_total\{[^}]*\} ([\d.e+]+)", self.get("/metrics"), flags=re.M)
        return sum(map(float, found))

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


def test_the_openai_server_finds_its_prefixes_after_a_restart(tmp_path):
    from bench.vllm_texts import TEXTS

    text, answers = TEXTS["logits"].read()[2000:6500], []
    for start in range(2):
        server = Server(tmp_path / "store", tmp_path / f"log{start}")
        try:
            assert server.hits() == 0
            answers.append(server.complete(text))
            found = server.hits()
        finally:
            server.stop()
        assert (found >= 5 * BLOCK) == bool(start), found
    assert answers[0].split()[:1] == answers[1].split()[:1], answers


def test_what_cannot_be_packed_is_refused_by_name_before_the_engine_starts(tmp_path):
    code = """
import sys, bench.vllm_engine as e
config = e.connector(sys.argv[2]); config.update(eval(sys.argv[3]))
try:
    e.Engine(sys.argv[1], config, max_num_batched_tokens=512)
except Exception as error:
    while error is not None:
        print(type(error).__name__, error); error = error.__cause__ or error.__context__
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    wrong = '{"kv_load_failure_policy": "fail"}'
    run = subprocess.run(
        [sys.executable, "-c", code, str(scenes.MODEL), str(tmp_path), wrong], cwd=tempfile.gettempdir(), env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "give 'recompute'" in run.stdout + run.stderr
