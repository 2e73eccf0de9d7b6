"""A figure of distances against images shown, one panel for each hospital."""

from __future__ import annotations

from training.evaluation.table import fd_name
from training.experiments.hospitals import CENTRAL, FEDERATED, Hospitals, curves
from training.federated.site import site_images

_COLOURS = {"alone": "#b5541c", FEDERATED: "#1f5fa8", CENTRAL: "#6b6b6b"}


def draw_curves(hospitals: Hospitals) -> None:
    """Write out/curves.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    measured, federation = curves(hospitals), hospitals.federation
    names = list(hospitals.sites)
    with mpl.rc_context({"svg.hashsalt": "dermis", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3), sharey=True, squeeze=False)
        for axis, hospital in zip(axes[0], names, strict=True):
            for label, arm in (("alone", hospital), (FEDERATED, FEDERATED), (CENTRAL, CENTRAL)):
                points = [point for point in measured.get(arm, {}).get(hospital, []) if point.round]
                if points:
                    x, y = [point.kimg for point in points], [point.fid for point in points]
                    axis.plot(x, y, color=_COLOURS[label], label=label, linewidth=1.4)
            site = hospitals.sites[hospital]
            images = site_images(site, federation.class_names, federation.binary, federation.resolution)
            axis.set_title(f"{hospital}: {len(images.train.labels):,} images", fontsize=9)
            axis.set_xlabel("thousand images shown at each hospital")
            axis.grid(alpha=0.25)
        axes[0][0].set_ylabel(fd_name(federation.extractor))
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(hospitals.out / "curves.svg", metadata={"Date": None})
        pyplot.close(figure)
