"""The look of Gradio's controls. `assets/studio.css` has the colours and everything else."""

from __future__ import annotations

import gradio as gr

# Fonts of the system: nothing is fetched, and text is shown at once.
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Return a theme whose colours are the variables of studio.css, which has a light and a dark value of each."""
    base = gr.themes.Base(font=list(_FONTS), font_mono=list(_MONO), radius_size="sm", spacing_size="md", text_size="md")
    colours = {
        "body_background_fill": "var(--ds-page)",
        "body_text_color": "var(--ds-text)",
        "body_text_color_subdued": "var(--ds-muted)",
        "background_fill_primary": "var(--ds-surface)",
        "background_fill_secondary": "var(--ds-sunken)",
        "border_color_primary": "var(--ds-line)",
        "border_color_accent": "var(--ds-accent)",
        "color_accent": "var(--ds-accent)",
        "color_accent_soft": "var(--ds-accent-soft)",
        "block_background_fill": "transparent",
        "block_border_width": "0px",
        "block_border_color": "var(--ds-line)",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "var(--ds-text)",
        "block_title_text_color": "var(--ds-text)",
        "block_info_text_color": "var(--ds-muted)",
        "block_shadow": "none",
        "panel_background_fill": "transparent",
        "input_background_fill": "var(--ds-surface)",
        "input_background_fill_focus": "var(--ds-surface)",
        "input_border_color": "var(--ds-control)",
        "input_border_color_focus": "var(--ds-accent)",
        "input_placeholder_color": "var(--ds-muted)",
        "input_border_width": "1px",
        "input_shadow_focus": "0 0 0 3px var(--ds-accent-soft)",
        "checkbox_background_color": "var(--ds-surface)",
        "checkbox_background_color_selected": "var(--ds-accent)",
        "checkbox_border_color": "var(--ds-control)",
        "checkbox_border_color_focus": "var(--ds-accent)",
        "checkbox_border_color_selected": "var(--ds-accent)",
        "checkbox_label_background_fill": "var(--ds-surface)",
        "checkbox_label_background_fill_hover": "var(--ds-sunken)",
        "checkbox_label_background_fill_selected": "var(--ds-accent-soft)",
        "checkbox_label_border_color": "var(--ds-control)",
        "checkbox_label_text_color": "var(--ds-text)",
        "checkbox_label_text_color_selected": "var(--ds-text)",
        "checkbox_label_border_width": "1px",
        "slider_color": "var(--ds-accent)",
        "loader_color": "var(--ds-accent)",
        "link_text_color": "var(--ds-link)",
        "link_text_color_hover": "var(--ds-link)",
        "link_text_color_active": "var(--ds-link)",
        "link_text_color_visited": "var(--ds-link)",
        "button_primary_background_fill": "var(--ds-accent)",
        "button_primary_background_fill_hover": "var(--ds-accent-strong)",
        "button_primary_border_color": "var(--ds-accent)",
        "button_primary_border_color_hover": "var(--ds-accent-strong)",
        "button_primary_text_color": "var(--ds-on-accent)",
        "button_secondary_background_fill": "var(--ds-surface)",
        "button_secondary_background_fill_hover": "var(--ds-sunken)",
        "button_secondary_border_color": "var(--ds-control)",
        "button_secondary_text_color": "var(--ds-text)",
        "button_cancel_background_fill": "var(--ds-surface)",
        "button_cancel_background_fill_hover": "var(--ds-sunken)",
        "button_cancel_border_color": "var(--ds-danger)",
        "button_cancel_text_color": "var(--ds-danger)",
        "button_border_width": "1px",
        "error_background_fill": "var(--ds-surface)",
        "error_text_color": "var(--ds-danger)",
        "error_border_color": "var(--ds-danger)",
        "table_border_color": "var(--ds-line)",
        "code_background_fill": "var(--ds-sunken)",
    }
    dark = {f"{name}_dark": value for name, value in colours.items() if hasattr(base, f"{name}_dark")}
    return base.set(
        **colours,
        **dark,
        block_padding="0px",
        block_label_text_size="*text_sm",
        block_label_text_weight="600",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        layout_gap="14px",
        button_large_text_weight="600",
        button_large_padding="9px 16px",
        button_large_text_size="*text_md",
        button_small_padding="5px 10px",
    )
