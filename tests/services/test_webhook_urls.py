"""Tests of which URLs messages of webhooks may be sent to, as far as the URLs themselves show."""

from __future__ import annotations

import pytest

from services.webhooks.sending import Allowed, UrlRefusedError, check_url


@pytest.mark.parametrize(
    "url",
    [
        "http://receiver.example/",
        "ftp://receiver.example/",
        "https://",
        "https://user:secret@receiver.example/",
        "https://receiver.example/#x",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:a00:1::]/",
        "https://[::127.0.0.1]/",
        "https://[::ffff:0:127.0.0.1]/",
        "https://[64:ff9b:1::a00:1]/",
        "https://[fec0::1]/",
        "https://[2001:10::1]/",
        "https://[ff0e::1]/",
        "https://192.0.0.192/",
        "https://168.63.129.16/",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://[fe80::1%25eth0]/",
        "https://receiver.example:0/",
        "https://receiver.example:99999/",
        "https://receiver.example/\r\nX: y",
        "https://receiver.example/" + "x" * 500,
        "https://localhost/",
        "https://localhost./",
        "https://Some.LOCALHOST/",
        "https://0/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1./",
        "https://017700000001/",
        "https://127.1/",
        "https://1.2.3.4./",
        "https://receiver.08/",
        "https://receiver..example/",
        "https://-receiver.example/",
        "https://%31%32%37.0.0.1/",
        "https://./",
    ],
)
def test_urls_that_lead_inside_are_refused(url: str) -> None:
    with pytest.raises(UrlRefusedError):
        check_url(url, Allowed.of(["10.9.0.0/16", "intern.example"]))


@pytest.mark.parametrize(
    "url",
    [
        "https://198.41.0.4/",
        "https://[2606:4700::1111]/",
        "https://[2a00:1450::1]:8443/",
        "https://receiver.example./",
        "https://xn--bcher-kva.example/",
        "https://4.a_b.0xg/",
    ],
)
def test_public_addresses_and_names_are_allowed(url: str) -> None:
    assert check_url(url, Allowed.of([]))


def test_operator_allows_names_of_this_machine() -> None:
    for url, allowed in (
        ("http://localhost./", ["localhost"]),
        ("https://localhost/", ["::1/128"]),
        ("http://intern.example/", ["Intern.example."]),
        ("http://2130706433/", ["2130706433"]),
    ):
        assert check_url(url, Allowed.of(allowed))
