"""Stands between a browser and a server, to make answers slow and the server busy at a test's word."""

import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Between:
    """A proxy on a free port of this machine.

    `pause` is the seconds before each event of a stream, `busy` how many of the next questions are answered 429,
    `broken` how many of the next streams end after their second event. `asked` holds the bodies of the questions,
    `left` counts the streams that the browser left before their end.
    """

    def __init__(self, port):
        self.upstream = port
        self.reset()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        self.pause, self.busy, self.broken, self.asked, self.left = 0.0, 0, 0, [], 0

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _handler(between):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.forward(None)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                between.asked.append(json.loads(body))
                if between.busy:
                    between.busy -= 1
                    error = {
                        "message": "8 requests wait already",
                        "type": "rate_limit_error",
                        "param": None,
                        "code": None,
                    }
                    return self.answer(429, json.dumps({"error": error}).encode(), {"retry-after": "2"})
                self.forward(body)

            def forward(self, body):
                upstream = http.client.HTTPConnection("127.0.0.1", between.upstream, timeout=60)
                sent = {name: self.headers[name] for name in ("content-type", "authorization") if name in self.headers}
                upstream.request(self.command, self.path, body, sent)
                response = upstream.getresponse()
                if "text/event-stream" in response.getheader("content-type", ""):
                    self.stream(response)
                else:
                    kept = ("content-type", "content-security-policy", "retry-after")
                    headers = {name: value for name in kept if (value := response.getheader(name))}
                    self.answer(response.status, response.read(), headers)
                upstream.close()

            def stream(self, response):
                self.send_response(response.status)
                self.send_header("content-type", response.getheader("content-type"))
                self.end_headers()
                events = 0
                broken = between.broken > 0
                between.broken -= broken
                try:
                    for line in response:
                        if line.startswith(b"data:"):
                            events += 1
                            if broken and events > 2:
                                return
                            time.sleep(between.pause)
                        self.wfile.write(line)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    between.left += 1

            def answer(self, status, body, headers):
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        return Handler
