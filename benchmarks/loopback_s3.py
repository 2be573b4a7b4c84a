"""As much of an S3 server as reading takes, on this machine: lists, HEAD, GET of ranges by sendfile; no signatures.

python benchmarks/loopback_s3.py FOLDER       # prints its port; sub-folders of FOLDER are buckets
"""

from __future__ import annotations

import os
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query, path = parse_qs(url.query), self.root / unquote(url.path).strip("/")
        if "list-type" in query:
            return self.answer(200, listing(path, query.get("prefix", [""])[0], "delimiter" not in query).encode())
        if not path.is_file():
            return self.answer(404, b"")
        size, first = path.stat().st_size, 0
        last = size - 1
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(last, int(end or last))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", etag(path))
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.flush()
            with path.open("rb") as file:
                while first <= last:
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(path: Path) -> str:
    return f'"{path.stat().st_mtime_ns:032x}"'


def listing(bucket: Path, prefix: str, deep: bool) -> str:
    folder = bucket / prefix
    inside = sorted(folder.rglob("*") if deep else folder.iterdir()) if folder.is_dir() else []
    files = "".join(
        f"<Contents><Key>{p.relative_to(bucket)}</Key><Size>{p.stat().st_size}</Size><ETag>{etag(p)}</ETag>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for p in inside
        if p.is_file()
    )
    folders = "".join(
        f"<CommonPrefixes><Prefix>{prefix}{p.name}/</Prefix></CommonPrefixes>"
        for p in inside
        if p.is_dir() and not deep
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
        f"</IsTruncated><KeyCount>{len(inside)}</KeyCount>{files}{folders}</ListBucketResult>"
    )


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
