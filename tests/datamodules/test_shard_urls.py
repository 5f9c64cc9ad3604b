"""Shards behind URLs: stored once and whole, or refused at once."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.shards import PER_SHARD, everything, says

from datamodules.readers.base import MissingData
from datamodules.readers.shards import Shards

pytestmark = pytest.mark.usefixtures("data_folder_of_its_own")


def test_a_url_is_stored_once(laion, tmp_path, data_folder_of_its_own):
    url = f"pipe:echo fetched >> {tmp_path}/log; cat {laion}/" + "{00000..00002}.tar"
    expected = everything(Shards(str(laion), 6))["caption"]
    for _ in range(2):
        assert everything(Shards(url, 6))["caption"] == expected
    assert (tmp_path / "log").read_text().split() == ["fetched"] * 3
    stored = [file for file in (data_folder_of_its_own / "shards").iterdir() if not file.name.startswith(".")]
    assert sorted(file.read_bytes() for file in stored) == sorted(file.read_bytes() for file in laion.glob("*.tar"))


def test_a_failed_transfer_leaves_no_partial_shard(laion, data_folder_of_its_own):
    url = f"pipe:head -c 3000 {laion}/00000.tar; exit 3"
    with pytest.raises(MissingData) as caught:
        Shards(url, 6)
    assert f"{url} could not be stored in {data_folder_of_its_own}/shards" in str(caught.value)
    assert [file for file in (data_folder_of_its_own / "shards").iterdir() if not file.name.endswith(".lock")] == []


@pytest.fixture
def server(laion: Path) -> Iterator[str]:
    """The address of a server on this machine that has the shards."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(laion))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_shard_that_a_server_does_not_have_is_missing(server):
    with pytest.warns(UserWarning, match=rf"1 of 4 shards are missing: {server}/00003\.tar"):
        source = Shards(server + "/{00000..00003}.tar", 6, max_missing=0.3)
    assert sorted(says(everything(source))) == list(range(3 * PER_SHARD))
    with pytest.raises(MissingData, match="names 2 shards; missing: "):
        Shards(server + "/{00003..00004}.tar", 6)


def test_without_a_network_a_url_is_refused_at_once(server, laion):
    whole = everything(Shards(f"{server}/00000.tar", 6))["caption"]
    host = "http://127.0.0.1:1"
    with pytest.raises(MissingData, match=f"{host}/a.tar cannot be reached .*fetch the shards where there is"):
        Shards(f"{host}/a.tar", 6)
    (laion / "00000.tar").unlink()  # what was stored needs no server
    assert everything(Shards(f"{server}/00000.tar", 6))["caption"] == whole


def test_an_address_of_no_known_kind_is_named():
    with pytest.raises(ValueError, match=r"s3://bucket/0\.tar: .*; choose https://, hf://, gs:// or pipe:"):
        Shards("s3://bucket/0.tar", 6)
