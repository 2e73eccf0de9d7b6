"""The studio in a browser with keys, scopes and quotas, and without a service."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from benchmarks import DEMO
from benchmarks.components import free_port
from launched_service import ROOT, Launched, launching
from studio_browser import Browser, browsing, press, shows, violations
from studio_pages import generate


@pytest.mark.full
def test_studio_alone_says_that_the_service_does_not_respond() -> None:
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from commands.main import main; main()",
        "studio",
        "--url",
        f"http://127.0.0.1:{free_port()}",
    ]
    with subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "The studio for" in process.stdout.readline()
            with browsing(f"http://127.0.0.1:{port}") as browser:
                page = browser.page()
                page.goto(f"{browser.address}/studio/")
                shows(page, "The service does not respond")
                assert violations(page) == []
        finally:
            process.terminate()


@pytest.mark.full
def test_visitor_signs_in_over_https_and_is_offered_what_the_key_may(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    from certificates import make_authority

    authority = make_authority(tmp_path / "authority.pem")
    authority.issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    port, data = free_port(), tmp_path / "data"
    command = [
        sys.executable,
        "-c",
        "from commands.main import main; main()",
        "keys",
        "create",
        "--tenant",
        "ward-3",
        "--name",
        "reader",
    ]
    made = subprocess.run(
        [*command, "--scope", "images", "--scope", "models:read"],
        cwd=ROOT,
        env=os.environ | {"DERMIS_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"dermis_sk_\S+", made.stdout)
    assert found is not None
    for service in launching(tmp_path):
        files = {"tls_certificate": str(tmp_path / "tls.crt"), "tls_key": str(tmp_path / "tls.key")}
        launched = service(str(DEMO), port, auth="keys", **files)
        launched.client = launched.client.__class__(base_url=f"https://127.0.0.1:{port}", verify=False, trust_env=False)
        launched.wait_until(launched.ready)
        with browsing(f"https://127.0.0.1:{port}") as browser:
            check_visit(browser, found[0])
        break


def check_visit(browser: Browser, key: str) -> None:
    """Sign in with a key for images and models, use the pages, and sign out."""
    page = browser.page()
    page.goto(f"{browser.address}/studio/datasets")
    field = page.get_by_label("API key or access token")
    field.fill("dermis_sk_wrong")
    press(page, "Sign in")
    shows(page, "does not accept this key")
    assert violations(page) == []
    page.get_by_label("API key or access token").fill(key)
    press(page, "Sign in")
    shows(page, "Datasets is not available with this key")
    assert violations(page) == []
    assert page.locator(".ds-nav a").all_inner_texts() == ["Generate", "Models"]
    cookies = page.context.cookies()
    assert [(cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) for cookie in cookies] == [
        (True, True, "Strict")
    ]
    page.goto(f"{browser.address}/studio/")
    generate(page)
    assert page.evaluate("document.cookie") == ""
    assert key not in page.content()
    assert page.locator(".ds-detail a.ds-button").all_inner_texts() == ["Save PNG"]
    press(page, "Sign out")
    page.get_by_label("API key or access token").wait_for()
    assert page.context.cookies() == []
    assert (browser.foreign, browser.errors) == ([], [])


MINIMAL_SCOPES = {
    "studies": ["Reader study"],
    "datasets:read": ["Datasets"],
    "datasets:read datasets:write models:read": ["Datasets", "Models"],
    "images models:read": ["Generate", "Models"],
    "edits models:read": ["Explore", "Models"],
    "projections models:read": ["Project", "Models"],
    "authenticity:generated images models:read": ["Generate", "Authenticity", "Map", "Models"],
    "classify models:read": ["Classify", "Models"],
}


def signed_in(browser: Browser, key: str) -> Any:
    """A page of the studio after a visitor has signed in with a key."""
    page = browser.page()
    page.goto(f"{browser.address}/studio/")
    page.get_by_label("API key or access token").fill(key)
    press(page, "Sign in")
    page.locator(".ds-nav a").first.wait_for()
    return page


def loaded(page: Any, name: str) -> None:
    """Open a page by its name in the navigation, and wait until it is complete."""
    page.get_by_role("navigation", name="Pages").get_by_role("link", name=name, exact=True).click()
    page.locator(".ds-title h1").wait_for()
    page.wait_for_load_state("networkidle")
    page.wait_for_function("document.querySelectorAll('.ds-bar').length === 0")


@pytest.mark.full
def test_pages_that_are_offered_work_with_the_scopes_and_quotas_of_the_key(tmp_path: Path) -> None:
    port, data = free_port(), tmp_path / "data"
    command = [sys.executable, "-c", "from commands.main import main; main()", "keys", "create", "--tenant", "ward-3"]
    environment = os.environ | {"DERMIS_DATA_DIR": str(data)}
    made = subprocess.run(
        [*command, "--name", "admin", "--scope", "admin"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    admin = re.search(r"dermis_sk_\S+", made.stdout)
    assert admin is not None
    for service in launching(tmp_path):
        launched = service(str(DEMO), port, auth="keys", quotas='{"spent": {"images_per_day": 16}}', max_studies="2")
        launched.wait_until(launched.ready)

        def key_for(scopes: str, tenant: str = "ward-3", launched: Launched = launched) -> tuple[str, str]:
            body = {"tenant": tenant, "name": "visitor", "scopes": scopes.split()}
            headers = {"Authorization": f"Bearer {admin[0]}"}
            answer = launched.client.post("/v1/admin/keys", json=body, headers=headers).json()
            return answer["id"], answer["key"]

        with browsing(f"http://127.0.0.1:{port}") as browser:
            for scopes, names in MINIMAL_SCOPES.items():
                page = signed_in(browser, key_for(scopes)[1])
                assert page.locator(".ds-nav a").all_inner_texts() == names, scopes
                for name in names:
                    loaded(page, name)
                    assert page.locator(".ds-problem").all_inner_texts() == [], (scopes, name)
                page.context.close()
            check_used_up_quota(
                signed_in(browser, key_for("images edits datasets:read datasets:write models:read", "spent")[1])
            )
            key_id, secret = key_for("images models:read")
            check_revoked_key(signed_in(browser, secret), launched, key_id, admin[0])
            assert (browser.foreign, browser.errors) == ([], [])
        break


def check_used_up_quota(page: Any) -> None:
    """Use all 16 images of a tenant; then each page says so before anything can be pressed."""
    press(page, "Generate")
    shows(page, "16 images of")
    for name, buttons in {
        "Generate": ["Generate"],
        "Explore": ["Make strip", "Draw map", "Make film"],
        "Datasets": ["Create dataset"],
    }.items():
        loaded(page, name)
        shows(page, "No generated images left today.")
        for button in buttons:
            assert page.get_by_role("button", name=button, exact=True).is_disabled(), button
        assert violations(page) == []


def check_revoked_key(page: Any, launched: Launched, key_id: str, admin: str) -> None:
    """Revoke the key of a page that is open: it says what to do, and loads as the sign-in."""
    page.wait_for_load_state("networkidle")
    headers = {"Authorization": f"Bearer {admin}"}
    assert launched.client.delete(f"/v1/admin/keys/{key_id}", headers=headers).is_success
    press(page, "Generate")
    shows(page, "Sign out and sign in with a key that is valid.")
    assert page.locator(".ds-problem h2").inner_text()
    press(page, "Sign out")
    page.get_by_label("API key or access token").wait_for()
