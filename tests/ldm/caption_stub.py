"""A server on this machine that answers like Claude's and OpenAI's, and fails in every way that
they can.

It sees the pictures: a caption names the colour, so that each can be told to be that of its
picture.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
STATUS_MESSAGES = {400: "picture not accepted", 401: "bad key", 404: "no such model", 429: "slow down", 500: "broken"}


class CaptionStub(ThreadingHTTPServer):
    """faults: {colour: [what to do with the next requests about it]}: an HTTP status, "silence",
    "cut", "garbled", "other json", "empty" or "decline". requests: [(colour, size in px, headers by
    lower-case name, body)]."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.faults, self.released, self.before_answer = [], {}, threading.Event(), lambda colour: None
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self):
        return sorted(colour for colour, *_ in self.requests)

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        request = json.loads(body)
        picture = Image.open(io.BytesIO(base64.b64decode(picture_in(request))))
        assert picture.format == "JPEG" and not picture.getexif()
        pixel = picture.getpixel((picture.width // 2, picture.height // 2))
        colour = min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((colour, picture.size, headers, request))
        self.server.before_answer(colour)
        faults = self.server.faults.get(colour) or ["answer"]
        fault = faults.pop(0)
        is_claude = self.path.endswith("/messages")
        if isinstance(fault, int):
            # Some servers put the key that they were sent into the message.
            message = f"{STATUS_MESSAGES[fault]} {self.headers.get('x-api-key') or self.headers.get('authorization')}"
            self.send(fault, json.dumps({"type": "error", "error": {"type": "x", "message": message}}))
        elif fault == "silence":
            self.server.released.wait(10)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"content": [{"type": "te')
        elif fault == "garbled":
            self.send(200, '{"content": [')
        elif fault == "other json":
            self.send(200, "{}")
        else:
            text = {"answer": f'"A {colour}\n square. "', "empty": "", "decline": ""}[fault]
            self.send(200, json.dumps((claude_answer if is_claude else openai_answer)(text, fault == "decline")))

    def send(self, status, text):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        if status != 200:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text.encode())


def picture_in(request):
    for part in request["messages"][0]["content"]:
        if part["type"] == "image":
            return part["source"]["data"]
        if part["type"] == "image_url":
            return part["image_url"]["url"].partition("base64,")[2]
    raise AssertionError("no picture was sent")


def claude_answer(text, declined):
    return {
        "id": "1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": text}],
        "stop_reason": "refusal" if declined else "end_turn", "usage": {"input_tokens": 100, "output_tokens": 10},
    }  # fmt: skip


def openai_answer(text, declined):
    message = {"role": "assistant", "content": None if declined else text, "refusal": "I cannot." if declined else None}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
