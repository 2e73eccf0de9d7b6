"""Tests of DICOM: other readers get the same pixels, the standard's tables and validators accept the objects."""

from __future__ import annotations

import email
import importlib.util
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.components import free_port
from dermis.errors import DermisError, RequestError
from dermis.exports.dicom import dicom_files, unique_identifier
from dermis.exports.source import open_source
from dermis.exports.stow import store_instances, stow_target
from painted_dataset import make
from tiny import make_bundle

pydicom: Any = pytest.importorskip("pydicom", reason="pydicom is not installed")
CLASSES = ("benign", "malignant", "a b.c")


@pytest.fixture(scope="module")
def objects(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The DICOM files of the painted dataset by name."""
    folder = tmp_path_factory.mktemp("dicom")
    made = {}
    for name, data in dicom_files(open_source(painted)):
        made[name] = folder / name.replace("/", "-")
        made[name].write_bytes(data)
    return made


def test_another_reader_gets_the_pixels_of_the_image_files(painted: Path, tmp_path: Path) -> None:
    """GDCM, which SimpleITK reads with, does not know dermoscopic photography."""
    if importlib.util.find_spec("SimpleITK") is None:
        pytest.skip("SimpleITK is not installed")
    made = dict(dicom_files(open_source(painted), "photographic"))
    assert len(made) == 20
    for number, data in enumerate(made.values()):
        (tmp_path / f"{number}.dcm").write_bytes(data)
    # In a process of its own: SimpleITK and FAISS are made by SWIG, and in one process FAISS gets vectors of the other.
    program = (
        "import sys, numpy, SimpleITK\n"
        "folder, count = sys.argv[1], int(sys.argv[2])\n"
        "read = lambda n: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(f'{folder}/{n}.dcm'))[0]\n"
        "numpy.save(f'{folder}/pixels.npy', numpy.stack([read(n) for n in range(count)]))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), str(len(made))], check=True, timeout=120)
    for name, pixels in zip(made, np.load(tmp_path / "pixels.npy"), strict=True):
        match = re.fullmatch(r"(malignant|a b\.c)/SYN_(\d{8})\.dcm", name)
        assert match
        assert (pixels == (int(match[2]), CLASSES.index(match[1]), 7)).all() and pixels.shape == (8, 8, 3)


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcm2pnm (dcmtk) is not installed")
def test_dcmtk_gets_the_pixels_of_dermoscopic_objects(objects: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    for name, path in list(objects.items())[::7]:
        subprocess.run(["dcm2pnm", "+op", str(path), str(tmp_path / "one.ppm")], check=True)
        with Image.open(tmp_path / "one.ppm") as image:
            expected = (int(name[-12:-4]), CLASSES.index(name.partition("/")[0]), 7)
            assert (np.asarray(image) == expected).all() and image.size == (8, 8)


def test_every_object_says_that_it_is_synthetic_and_has_no_patient(objects: dict[str, Path], painted: Path) -> None:
    source = open_source(painted)
    rows = {sample.name: sample.row for sample in source.samples()}
    for name, path in objects.items():
        read = pydicom.dcmread(path)
        assert read.SyntheticData == "YES" and read.file_meta.TransferSyntaxUID.is_little_endian
        assert read.SOPClassUID.name == "Dermoscopic Photography Image Storage"
        assert str(read.PatientName) == "Synthetic^No patient" and read.PatientID.startswith("SYNTHETIC-")
        dates = (
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "ReferringPhysicianName",
        )
        assert [read[each].is_empty for each in dates] == [True] * 6
        assert (read.Manufacturer, read.DeviceSerialNumber) == ("dermis", source.manifest.bundle_digest)
        context = {
            item.ConceptNameCodeSequence[0].CodeValue: (
                item.ConceptCodeSequence[0].CodeMeaning if item.ValueType == "CODE" else item.TextValue
            )
            for item in read.AcquisitionContextSequence
        }
        row = rows[name.split("/")[1].removesuffix(".dcm")]
        assert (context["class"], context["seed"], context["index"]) == (row["target"], row["seed"], row["index"])
        assert context["image-sha256"] == row["sha256"] and context["dataset-sha256"] == source.digest
        assert read.SeriesDescription == f"Synthetic: {row['target']}" and read.LossyImageCompression == "00"


def test_identifiers_and_bytes_follow_from_the_dataset(objects: dict[str, Path], painted: Path, tmp_path: Path) -> None:
    assert {name: path.read_bytes() for name, path in objects.items()} == dict(dicom_files(open_source(painted)))
    read = [pydicom.dcmread(path, stop_before_pixels=True) for path in objects.values()]
    assert len({each.SOPInstanceUID for each in read}) == 20
    assert len({each.StudyInstanceUID for each in read}) == 1
    assert len({(each.SeriesInstanceUID, each.SeriesNumber, each.SeriesDescription) for each in read}) == 2
    assert all(each.SOPInstanceUID.is_valid and each.SOPInstanceUID.startswith("2.25.") for each in read)
    digest = open_source(painted).digest
    assert read[0].SOPInstanceUID == unique_identifier(digest, "image", 0)
    bundle = make_bundle(tmp_path / "bundle", classes=CLASSES)
    make(tmp_path / "other", bundle, classes={"malignant": 1}, seed=1, image_format="jpeg")
    (data,) = dict(dicom_files(open_source(tmp_path / "other"))).values()
    (tmp_path / "one.dcm").write_bytes(data)
    other = pydicom.dcmread(tmp_path / "one.dcm")
    assert {other.SOPInstanceUID, other.StudyInstanceUID}.isdisjoint(
        {each.SOPInstanceUID for each in read} | {each.StudyInstanceUID for each in read}
    )
    assert (other.LossyImageCompression, other.LossyImageCompressionMethod) == ("01", "ISO_10918_1")


def test_objects_have_the_attributes_that_the_standard_requires(objects: dict[str, Path]) -> None:
    """The tables of the standard are those that highdicom brings."""
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    tables = files("highdicom") / "_standard"
    modules = json.loads((tables / "iod_module_map.json").read_text())["dermoscopic-photography-image"]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    read = pydicom.dcmread(next(iter(objects.values())))
    top = {
        each["keyword"]: each["type"]
        for module in modules
        if module["usage"] == "M"
        for each in attributes[module["key"]]
        if not each["path"]
    }
    assert len([kind for kind in top.values() if kind in ("1", "2")]) > 25
    missing = [name for name, kind in top.items() if kind in ("1", "2") and name not in read]
    empty = [name for name, kind in top.items() if kind == "1" and name in read and read[name].is_empty]
    assert (missing, empty) == ([], [])
    known = {each["keyword"] for module in modules for each in attributes[module["key"]] if not each["path"]}
    # An earlier edition of the standard requires the frame of reference; in later ones Synthetic Data is of SOP Common.
    further = {"FrameOfReferenceUID", "PositionReferenceIndicator", "SyntheticData", "FileMetaInformationVersion"}
    assert {element.keyword for element in read} - known <= further


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(painted: Path, tmp_path: Path) -> None:
    for kind, name in (("dermoscopic", "DermoscopicPhotographyImage"), ("photographic", "VLPhotographicImage")):
        for _, data in list(dicom_files(open_source(painted), kind))[::9]:
            (tmp_path / "one.dcm").write_bytes(data)
            run = subprocess.run(["dciodvfy", tmp_path / "one.dcm"], capture_output=True, text=True, check=False)
            lines = run.stderr.splitlines()
            assert name in lines
            # Programs from before 2023 do not know the attribute Synthetic Data.
            assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []


class _Stow(BaseHTTPRequestHandler):
    """A server of STOW-RS that reads parts by the standard library."""

    received: list[bytes]
    headers_seen: list[Message]
    answer: tuple[int, dict[str, Any]]
    endless = False
    sent = 0
    stopped = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
        type(self).headers_seen.append(self.headers)
        for part in message.walk():
            if part.get_content_type() == "application/dicom":
                payload = part.get_payload(decode=True)
                assert isinstance(payload, bytes)
                type(self).received.append(payload)
        status, document = self.answer
        if self.endless:
            self._answer_without_end()
            return
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer_without_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while self.sent < 1 << 30:
                self.wfile.write(bytes(1 << 16))
                type(self).sent += 1 << 16
        except OSError:
            pass
        self.stopped.set()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Callable[[int, dict[str, Any]], tuple[str, type[_Stow]]]]:
    _Stow.received, _Stow.headers_seen = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Stow)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()

    def start(status: int = 200, document: dict[str, Any] | None = None) -> tuple[str, type[_Stow]]:
        _Stow.answer = (status, document or {})
        return f"http://127.0.0.1:{running.server_port}/dicom-web/", _Stow

    yield start
    running.shutdown()
    running.server_close()


def test_objects_are_sent_in_batches_with_the_credentials(server: Any, painted: Path) -> None:
    url, seen = server()
    made = list(dicom_files(open_source(painted)))
    copies = [*made, *made, *made]  # 60: more than a batch
    assert store_instances(stow_target(url, "Bearer secret"), copies) == 60
    assert seen.received == [data for _, data in copies]
    assert [headers["Authorization"] for headers in seen.headers_seen] == ["Bearer secret"] * 2


@pytest.mark.parametrize(
    ("status", "document", "message"),
    [
        (401, {}, r"refuses access \(status 401\); set DERMIS_DICOMWEB_AUTHORIZATION"),
        (500, {}, r"did not store 1 files from a\.dcm to a\.dcm \(status 500\)"),
        (
            202,
            {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [43264]}}]}},
            r"did not store 1 of 1 files from a\.dcm to a\.dcm \(status 202; first failure reason 43264\)",
        ),
    ],
)
def test_refusals_of_a_server_are_named(server: Any, status: int, document: dict[str, Any], message: str) -> None:
    url, _ = server(status, document)
    with pytest.raises(DermisError, match=message) as caught:
        store_instances(stow_target(url, "Bearer secret"), [("a.dcm", b"x")])
    assert "secret" not in str(caught.value) + repr(stow_target(url, "Bearer secret"))


def test_objects_that_were_stored_with_warnings_are_stored(server: Any) -> None:
    url, _ = server(202, {"00081199": {"vr": "SQ", "Value": [{}]}})
    assert store_instances(stow_target(url, "Bearer secret"), [("a.dcm", b"x")]) == 1


def test_credentials_for_this_machine_reach_no_proxy(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, seen = server()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("dermis.exports.stow._TIMEOUT", 30.0)  # the proxy does not answer
        assert store_instances(stow_target(url, "Bearer secret"), [("a.dcm", b"x")]) == 1
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert [headers["Authorization"] for headers in seen.headers_seen] == ["Bearer secret"]


def test_answer_of_a_server_is_escaped_and_read_up_to_its_limit(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "\x1b]0;title\x07" + "x" * 5000
    url, _ = server(202, {"00081198": {"Value": [{"00081197": {"Value": [reason]}}]}})
    with pytest.raises(DermisError, match=r"first failure reason \\x1b\]0;title\\x07x+\.\.\.\)") as caught:
        store_instances(stow_target(url, None), [("a.dcm", b"x")])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    url, handler = server(200, {})
    monkeypatch.setattr(handler, "endless", True)
    with pytest.raises(DermisError, match=r"sent an answer of more than 8,388,608 bytes \(status 200\)"):
        store_instances(stow_target(url, None), [("a.dcm", b"x")])
    # The connection was closed at the limit: buffers of the system hold a little more.
    assert handler.stopped.wait(30) and handler.sent < 64 << 20


@pytest.mark.parametrize(
    ("url", "authorization", "message"),
    [
        ("dicom-web", None, "must be the address"),
        ("https://me:pass@example.org/dicom-web", None, "must not contain credentials"),
        ("http://example.org/dicom-web", "Bearer secret", "must begin with https"),
    ],
)
def test_addresses_that_would_reveal_credentials_are_refused(url: str, authorization: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        stow_target(url, authorization)
    assert "pass" not in str(caught.value) and "secret" not in str(caught.value)


def check_dicomweb(client: Any, dataset: Path) -> None:
    """Find the objects by QIDO-RS, and get each by WADO-RS as it was sent."""
    sent = {pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID: data for _, data in dicom_files(open_source(dataset))}
    accept = {"Accept": "application/dicom+json"}
    # In the address and not in `params`, which would send %2A: Orthanc takes that for the text itself.
    studies = client.get("/dicom-web/studies?PatientID=SYNTHETIC-*", headers=accept).json()
    (study,) = (each["0020000D"]["Value"][0] for each in studies)
    instances = client.get(f"/dicom-web/studies/{study}/instances", headers=accept).json()
    assert {each["00080018"]["Value"][0] for each in instances} == sent.keys()
    for each in instances:
        series, number = (each[tag]["Value"][0] for tag in ("0020000E", "00080018"))
        answer = client.get(
            f"/dicom-web/studies/{study}/series/{series}/instances/{number}",
            headers={"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'},
        )
        head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
        (part,) = email.message_from_bytes(head + answer.content).get_payload()
        assert part.get_payload(decode=True) == sent[number]  # type: ignore[union-attr]


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("Orthanc") is None or not Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so").exists(),
    reason="Orthanc with its DICOMweb plugin is not installed",
)
def test_orthanc_stores_the_objects_once_and_shows_their_pixels(painted: Path, tmp_path: Path) -> None:
    import httpx
    from PIL import Image

    port, dicom_port = free_port(), free_port()
    settings = {
        "StorageDirectory": str(tmp_path / "db"),
        "IndexDirectory": str(tmp_path / "db"),
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "DicomPort": dicom_port,
        "RemoteAccessAllowed": False,
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with subprocess.Popen(["Orthanc", str(tmp_path / "orthanc.json")], stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=10), timeout=60) as client:
                assert client.get("/system").status_code == 200
                for _ in range(2):
                    assert (
                        store_instances(stow_target(f"{address}/dicom-web", None), dicom_files(open_source(painted)))
                        == 20
                    )
                assert client.get("/statistics").json()["CountInstances"] == 20
                for instance in client.get("/instances").json():
                    tags = client.get(f"/instances/{instance}/simplified-tags").json()
                    number = int(tags["InstanceNumber"]) - 1
                    (tmp_path / "shown.png").write_bytes(client.get(f"/instances/{instance}/preview").content)
                    with Image.open(tmp_path / "shown.png") as image:
                        pixels = np.asarray(image.convert("RGB"))
                    label = CLASSES.index(tags["SeriesDescription"].removeprefix("Synthetic: "))
                    assert (pixels == (number, label, 7)).all()
                check_dicomweb(client, painted)
        finally:
            process.terminate()
