"""Tests of --binary with all labels of Fitzpatrick17k, DDI and the ISIC Archive, which has those of ISIC 2024 (SLICE-3D)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dermis.errors import DataError
from training.data.class_names import ClassRules, class_of
from training.data.diagnoses import binary_class, other_malignancy
from training.data.sources import read_source

FITZPATRICK17K = """
    acanthosis nigricans, acne, acne vulgaris, acquired autoimmune bullous diseaseherpes gestationis,
    acrodermatitis enteropathica, actinic keratosis, allergic contact dermatitis, aplasia cutis, basal cell carcinoma,
    basal cell carcinoma morpheiform, becker nevus, behcets disease, calcinosis cutis, cheilitis, congenital nevus,
    dariers disease, dermatofibroma, dermatomyositis, disseminated actinic porokeratosis, drug eruption,
    drug induced pigmentary changes, dyshidrotic eczema, eczema, ehlers danlos syndrome, epidermal nevus,
    epidermolysis bullosa, erythema annulare centrifigum, erythema elevatum diutinum, erythema multiforme,
    erythema nodosum, factitial dermatitis, fixed eruptions, folliculitis, fordyce spots, granuloma annulare,
    granuloma pyogenic, hailey hailey disease, halo nevus, hidradenitis, ichthyosis vulgaris, incontinentia pigmenti,
    juvenile xanthogranuloma, kaposi sarcoma, keloid, keratosis pilaris, langerhans cell histiocytosis,
    lentigo maligna, lichen amyloidosis, lichen planus, lichen simplex, livedo reticularis, lupus erythematosus,
    lupus subacute, lyme disease, lymphangioma, malignant melanoma, melanoma, milia, mucinosis, mucous cyst,
    mycosis fungoides, myiasis, naevus comedonicus, necrobiosis lipoidica, nematode infection, neurodermatitis,
    neurofibromatosis, neurotic excoriations, neutrophilic dermatoses, nevocytic nevus, nevus sebaceous of jadassohn,
    papilomatosis confluentes and reticulate, paronychia, pediculosis lids, perioral dermatitis, photodermatoses,
    pilar cyst, pilomatricoma, pityriasis lichenoides chronica, pityriasis rosea, pityriasis rubra pilaris,
    porokeratosis actinic, porokeratosis of mibelli, porphyria, port wine stain, prurigo nodularis, psoriasis,
    pustular psoriasis, pyogenic granuloma, rhinophyma, rosacea, sarcoidosis, scabies, scleroderma, scleromyxedema,
    seborrheic dermatitis, seborrheic keratosis, solid cystic basal cell carcinoma, squamous cell carcinoma,
    stasis edema, stevens johnson syndrome, striae, sun damaged skin, superficial spreading melanoma ssm, syringoma,
    telangiectases, tick bite, tuberous sclerosis, tungiasis, urticaria, urticaria pigmentosa, vitiligo, xanthomas,
    xeroderma pigmentosum
"""
DDI = """
    melanoma-in-situ mycosis-fungoides squamous-cell-carcinoma-in-situ basal-cell-carcinoma squamous-cell-carcinoma
    melanoma-acral-lentiginous basal-cell-carcinoma-superficial squamous-cell-carcinoma-keratoacanthoma
    subcutaneous-t-cell-lymphoma melanocytic-nevi seborrheic-keratosis-irritated focal-acral-hyperkeratosis
    hyperpigmentation lipoma foreign-body-granuloma blue-nevus verruca-vulgaris acrochordon wart epidermal-nevus
    abrasions-ulcerations-and-physical-injuries basal-cell-carcinoma-nodular epidermal-cyst
    acquired-digital-fibrokeratoma seborrheic-keratosis trichilemmoma pyogenic-granuloma neurofibroma
    syringocystadenoma-papilliferum nevus-lipomatosus-superficialis benign-keratosis inverted-follicular-keratosis
    onychomycosis dermatofibroma trichofolliculoma lymphocytic-infiltrations prurigo-nodularis kaposi-sarcoma scar
    eccrine-poroma angioleiomyoma keloid hematoma metastatic-carcinoma melanoma angioma folliculitis
    atypical-spindle-cell-nevus-of-reed xanthogranuloma eczema-spongiotic-dermatitis arteriovenous-hemangioma
    acne-cystic verruciform-xanthoma molluscum-contagiosum condyloma-accuminatum morphea neuroma dysplastic-nevus
    nodular-melanoma-(nm) actinic-keratosis pigmented-spindle-cell-nevus-of-reed dermatomyositis glomangioma
    cellular-neurothekeoma fibrous-papule graft-vs-host-disease lichenoid-keratosis reactive-lymphoid-hyperplasia
    coccidioidomycosis leukemia-cutis sebaceous-carcinoma chondroid-syringoma tinea-pedis solar-lentigo
    clear-cell-acanthoma abscess blastic-plasmacytoid-dendritic-cell-neoplasm acral-melanotic-macule
"""
MELANOMAS = {
    "lentigo maligna", "malignant melanoma", "melanoma", "superficial spreading melanoma ssm", "melanoma-acral-lentiginous",
    "melanoma-in-situ", "nodular-melanoma-(nm)",
}  # fmt: skip
# Together with the melanomas and, in Fitzpatrick17k, actinic keratosis, these are the labels that three_partition_label (2,263
# images) and the column malignant of DDI state to be malignant.
OTHER_CANCERS = {
    "basal cell carcinoma", "basal cell carcinoma morpheiform", "kaposi sarcoma", "mycosis fungoides",
    "solid cystic basal cell carcinoma", "squamous cell carcinoma",
    "basal-cell-carcinoma", "basal-cell-carcinoma-nodular", "basal-cell-carcinoma-superficial",
    "blastic-plasmacytoid-dendritic-cell-neoplasm", "kaposi-sarcoma", "leukemia-cutis", "metastatic-carcinoma",
    "mycosis-fungoides", "sebaceous-carcinoma", "squamous-cell-carcinoma", "squamous-cell-carcinoma-in-situ",
    "squamous-cell-carcinoma-keratoacanthoma", "subcutaneous-t-cell-lymphoma",
}  # fmt: skip
PRECANCERS = {"actinic keratosis", "actinic-keratosis"}
ARCHIVE = (Path(__file__).parent / "archive-diagnoses.txt").read_text(encoding="utf-8").splitlines()[1:]
COLLISION = "Malignant:Collision - At least one malignant proliferation"


@pytest.mark.parametrize(
    ("labels", "count"), [(FITZPATRICK17K.replace("\n", " ").strip().split(", "), 114), (DDI.split(), 78)]
)
def test_every_label_has_the_class_of_its_meaning(labels: list[str], count: int) -> None:
    labels = [" ".join(label.split()) for label in labels]
    assert len(set(labels)) == count
    assert {label for label in labels if binary_class(label) == "malignant"} == MELANOMAS & set(labels)
    assert {label for label in labels if binary_class(label) != "benign"} <= MELANOMAS
    assert {label for label in labels if other_malignancy(label) == "cancer"} == OTHER_CANCERS & set(labels)
    assert {label for label in labels if other_malignancy(label) == "precancer"} == PRECANCERS & set(labels)


def _classes(paths: list[str]) -> list[str]:
    """Classes by five levels and, as in ISIC 2024, a column with all of them."""
    rows = [[*[*path.split(":"), *[""] * 5][:5], path.replace(":", "::")] for path in paths]
    return list(class_of(rows, ClassRules(Path("t.csv"), "diagnosis_1", True, False, {}))[0])


def test_every_diagnosis_of_the_archive_has_the_class_of_its_levels() -> None:
    known = [path for path in ARCHIVE if path != COLLISION]
    for path, class_name in zip(known, _classes(known), strict=True):
        general = path.split(":")[0]
        expected = "malignant" if "(Melanoma)" in path else "benign" if ":" in path or general == "Benign" else ""
        assert class_name == expected, path
        if expected == "benign":
            kind = {"Benign": "", "Malignant": "cancer", "Indeterminate": "precancer"}[general]
            assert other_malignancy(path.replace(":", " / ")) == kind, path
        if ":" in path:
            assert binary_class(path.split(":")[-1]) == expected, f"{path}: without its levels"
    with pytest.raises(DataError, match="cannot decide .*Collision - At least one malignant proliferation"):
        _classes([COLLISION])


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("melanoma by history", None),
        ("melanoma vs nevus", None),
        ("graft vs melanoma", None),
        ("not melanocytic nevus", None),
        ("melanoma like", None),
        ("neoplasm", None),
        ("xeroderma pigmentosum with melanoma", None),
    ],
)
def test_exemptions_do_not_hide_a_doubt(value: str, answer: str | None) -> None:
    assert binary_class(value) == answer


def test_other_cancers_in_the_class_benign_are_reported(tmp_path: Path) -> None:
    rows = ["bcc", "bcc", "akiec", "nv", "mel"]
    table = "\n".join(["image_id,dx", *(f"a{i},{dx}" for i, dx in enumerate(rows))])
    (tmp_path / "t.csv").write_text(table)
    note = " ".join(read_source(tmp_path / "t.csv", binary=True).report.notes)
    assert "2 images of another cancer than melanoma: 'bcc' (2)" in note
    assert "1 images of a precursor or an uncertain lesion: 'akiec' (1)" in note
    assert not read_source(tmp_path / "t.csv").report.notes
    assert not read_source(tmp_path / "t.csv", binary=True, mapping={"bcc": "", "akiec": ""}).report.notes
