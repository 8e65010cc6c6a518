"""ComfyUI's web server in front of the fake host: enough for the real page (comfyui-frontend-package) to load, queue and show.

python tests/fakes/web_server.py [--port 8188]       then open the printed address
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfyui_frontend_package
import core_nodes
import executor
from aiohttp import WSMsgType, web
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(comfyui_frontend_package.__file__).with_name("static")
# what the page asks for at its start and can do without
EMPTY: dict[str, Any] = {
    "/queue": {"queue_running": [], "queue_pending": []},
    "/history": {},
    "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 100, "total": 0, "has_more": False}},
    "/embeddings": [],
    "/experiment/models": [],
    "/models": [],
    "/userdata": [],
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/users": {"storage": "server", "migrated": True},
    "/features": {"supports_preview_metadata": True, "max_upload_size": 10**8},
    "/system_stats": {
        "system": {
            "os": "linux", "comfyui_version": "0.33.0", "python_version": "3", "pytorch_version": "2", "embedded_python": False, "argv": [],
            "ram_total": 1, "ram_free": 1,
        },
        "devices": [
            {
                "name": "cpu", "type": "cpu", "index": 0, "vram_total": 1, "vram_free": 1, "torch_vram_total": 1, "torch_vram_free": 1,
            }
        ],
    },
}  # fmt: skip


def give(make: Callable[[], Any]) -> Any:
    """A handler that answers with what ``make`` returns, as JSON."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(make())

    return handler


class Server:
    """Serves a loaded pack. ``prompts`` are those that were queued; settings live as long as the server."""

    def __init__(self, host: Any) -> None:
        self.ours = host.pack.NODE_CLASS_MAPPINGS
        self.info = json.loads(json.dumps(executor.info(self.ours)))
        self.host, self.prompts, self.settings = (
            host,
            [],
            {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False},
        )
        self.sockets: list[web.WebSocketResponse] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.ready = threading.Event()
        self.port = 0

    def __enter__(self) -> Server:
        self.host.server.send_sync = self.send
        self.thread.start()
        assert self.ready.wait(30), "the fake server did not start"
        return self

    def __exit__(self, *exc: Any) -> None:
        del self.host.server.send_sync  # the class's own again
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def send(self, event: str, data: dict[str, Any], sid: Any = None) -> None:
        """From any thread, as PromptServer.send_sync."""
        for socket in self.sockets:
            asyncio.run_coroutine_threadsafe(socket.send_json({"type": event, "data": data}), self.loop)

    def _serve(self) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        runner = web.AppRunner(self._app())
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        self.loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=10**8)
        for prefix in ("", "/api"):
            for path, answer in EMPTY.items():
                app.router.add_get(prefix + path, give(lambda answer=answer: answer))
            app.router.add_get(f"{prefix}/ws", self._socket)
            app.router.add_get(f"{prefix}/object_info", give(lambda: self.info))
            app.router.add_get(f"{prefix}/settings", give(lambda: self.settings))
            app.router.add_post(f"{prefix}/settings", self._set)
            app.router.add_post(f"{prefix}/settings/{{id}}", self._set)
            app.router.add_get(f"{prefix}/extensions", give(self._scripts))
            app.router.add_get(f"{prefix}/i18n", give(self._locales))
            app.router.add_get(f"{prefix}/workflow_templates", give(lambda: {"tqai": self._templates()}))
            app.router.add_post(f"{prefix}/prompt", self._prompt)
            app.router.add_get(f"{prefix}/view", self._view)
            app.router.add_static(f"{prefix}/workflow_templates/tqai", ROOT / "workflows")
        app.router.add_static("/extensions/tqai", ROOT / "web")
        app.router.add_get("/", self._index)
        app.router.add_static("/", PAGE)
        return app

    def _scripts(self) -> list[str]:
        core = [f"/{p.relative_to(PAGE).as_posix()}" for p in sorted((PAGE / "extensions").rglob("*.js"))]
        return core + [f"/extensions/tqai/{p.relative_to(ROOT / 'web').as_posix()}" for p in sorted((ROOT / "web").rglob("*.js"))]

    def _locales(self) -> dict[str, Any]:
        return {
            folder.name: {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
            for folder in sorted((ROOT / "locales").iterdir())
        }

    def _templates(self) -> list[str]:
        return sorted(p.stem for p in (ROOT / "workflows").glob("*.json"))

    async def _index(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _set(self, request: web.Request) -> web.Response:
        value = await request.json()
        self.settings.update({request.match_info["id"]: value} if "id" in request.match_info else value)
        return web.Response()

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "fake"}})
        self.sockets.append(socket)
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        self.sockets.remove(socket)
        return socket

    async def _prompt(self, request: web.Request) -> web.Response:
        prompt = (await request.json())["prompt"]
        found = executor.errors(prompt, self.info, self.ours)
        if found:
            told = {}
            for node, messages in found.items():
                told[node] = {"class_type": prompt[node]["class_type"], "errors": []}
                told[node]["errors"] = [{"type": "value", "message": m, "details": m} for m in messages]
            error = {"type": "prompt_outputs_failed_validation", "message": json.dumps(found), "details": "", "extra_info": {}}
            return web.json_response({"error": error, "node_errors": told}, status=400)
        self.prompts.append(prompt)
        key = str(len(self.prompts))
        self.loop.run_in_executor(None, self._run, prompt, key)
        return web.json_response({"prompt_id": key, "number": len(self.prompts), "node_errors": {}})

    def _run(self, prompt: dict[str, Any], key: str) -> None:
        try:
            executor.execute(prompt, self.ours, self.send, key)
        except Exception as error:
            told = {"exception_message": str(error), "exception_type": type(error).__name__, "traceback": []}
            self.send("execution_error", {"prompt_id": key, "node_id": "", "node_type": "", **told})
            raise
        self.send("executing", {"node": None, "prompt_id": key})
        self.send("execution_success", {"prompt_id": key})

    async def _view(self, request: web.Request) -> web.Response:
        """The pictures that image nodes of the fake host showed; any other name is a small grey one."""
        stem = request.query["filename"].partition(".")[0]
        buffer = io.BytesIO()
        if stem.isdigit() and int(stem) < len(core_nodes.IMAGES):
            Image.fromarray((core_nodes.IMAGES[int(stem)][0] * 255).byte().numpy()).save(buffer, "PNG")
        else:
            Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
        return web.Response(body=buffer.getvalue(), content_type="image/png")


if __name__ == "__main__":
    import argparse
    import sys
    import tempfile

    sys.path.append(str(ROOT / "tests/comfyui"))
    sys.path.append(str(ROOT))
    import hosts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188)
    with tempfile.TemporaryDirectory() as folder, hosts.fake("0.33.0", Path(folder)) as made:
        server = Server(made)
        server.port = parser.parse_args().port
        with server:
            print(f"http://127.0.0.1:{server.port}")
            server.thread.join()
