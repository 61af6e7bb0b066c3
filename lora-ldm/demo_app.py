"""A page to start a training, watch it, compare pictures, and choose a checkpoint by a grid.

    streamlit run lora-ldm/demo_app.py
    streamlit run lora-ldm/demo_app.py -- --root output --base models/sd15 --images data

Without a run of one's own it opens with the default run, which comes with the project.
It works on what it was started with and nothing else: runs in the folders of --root (new ones go
into the first), bases of --base beside the embedded one, pictures of --images beside the project's.
Whoever reaches the page can start trainings: .streamlit/config.toml keeps it on this machine.
"""

import argparse
import io
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quiet_libraries  # noqa: F401  (before diffusers)

from es_lora.command_line import say, shown_path
from settings.entry_point import missing_package

try:
    import streamlit as st
except ModuleNotFoundError as error:
    say("demo_app", missing_package(error.name))
    sys.exit(2)
if __name__ == "__main__" and not st.runtime.exists():
    say("demo_app", f"this is a page, which streamlit shows: streamlit run {shown_path(__file__)}")
    sys.exit(2)

from demo.process import (
    LIMITS,
    MOST_RUNNING,
    OFFERED_RULES,
    PRECISIONS,
    TrainingProcess,
    TrainingSettings,
    command,
    is_sdxl_base,
    refuse_picture,
)
from demo.run_folders import EXAMPLE, TREE, ExampleRun, Places, Run, decision_of, offered
from es_lora.history import HISTORY_NAME, History
from es_lora.report import draw

PROJECT = TREE.parent
EMBEDDED = "embedded base (64 px)"
EXAMPLES = ("portraits", "architecture", "landscape", "stills")
EXAMPLE_PROMPT = "portrait, boy, fluent 3d style --d 1 --l 5 --s 20"
REFRESH_SEC = 2
THUMBNAIL_PX = 128
MOST_GROUPS = 20  # of pictures in a session
STYLE = """
<style>
.block-container { padding-top: 3.2rem; max-width: 78rem }
[data-testid="stImage"] img { border-radius: .5rem; image-rendering: auto }
[data-testid="stMetric"] { background: #f4f6f5; border-radius: .6rem; padding: .6rem .9rem }
</style>
"""


def parse_places(argv: Sequence[str] = None) -> Places:
    """Places from the words after `--`. Raises ValueError, once, for folders not there."""
    parser = argparse.ArgumentParser(prog="demo_app.py", allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--root", action="append", type=Path, help="folder of runs; may be repeated (default: output of the project)")
    add("--base", action="append", default=[], help="diffusers folder, checkpoint file or hub name; may be repeated")
    add("--images", action="append", type=Path, default=[], help="folder of <repeats>_<name> folders; may be repeated")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    problems = [f"{word} is unknown: there are --root, --base and --images" for word in unknown]
    if not args.root:
        args.root = [PROJECT / "output"]
        args.root[0].mkdir(exist_ok=True)
    roots = [folder.resolve() for folder in args.root]
    problems += [f"--root {folder} does not exist" for folder in roots if not folder.is_dir()]
    problems += [f"--images {folder} does not exist" for folder in args.images if not folder.is_dir()]
    if problems:
        raise ValueError("\n".join(problems))
    bases = {EMBEDDED: str(TREE / "tiny_base"), **{base: base for base in args.base}}
    images = {str(folder): folder.resolve() for folder in args.images}
    images.update({f"{name} (example)": PROJECT / "dataset" / name / "train" for name in EXAMPLES})
    return Places(roots, bases, images, EXAMPLE)


@st.cache_resource
def trainings() -> dict[Path, TrainingProcess]:
    """{folder: TrainingProcess} of this server."""
    return {}


@st.cache_resource(show_spinner="Loading the base ...", max_entries=1)
def picture_maker(base: str, v2: bool, v_parameterization: bool, clip_skip: int | None) -> Any:
    from grid.pictures import PictureMaker

    return PictureMaker(base, v2=v2, v_parameterization=v_parameterization, clip_skip=clip_skip)


def watch(places: Places) -> None:
    st.title("Watch a run")
    run = choose_run(places, "watched")
    if run is None:
        return
    process = trainings().get(run.folder)
    going_on = process.exit_code is None if process else run.result() is None
    st.fragment(show_run, run_every=REFRESH_SEC if going_on else None)(run)


def choose_run(places: Places, key: str) -> Run | None:
    """The run that a person chose from those offered, None where there are none yet."""
    names = list(places.runs())
    if not names:
        st.info(f"No runs in {', '.join(map(str, places.roots))} yet. Start one, or name another folder with --root.")
        return None
    before = st.session_state.get("run")
    name = st.selectbox("Run", names, index=names.index(before) if before in names else 0, key=f"{key}_run_{before}")
    st.session_state["run"] = name
    run = places.run(name)
    if isinstance(run, ExampleRun):
        st.info(
            f"No runs in {', '.join(map(str, places.roots))} yet: this one comes with the project. Start makes yours."
        )
    return run


def show_run(run: Run) -> None:
    """A run, or the one message that says why it cannot be shown; drawn anew by itself."""
    try:
        show_whole_run(run)
    except (ValueError, OSError) as error:
        st.error(str(error))


def show_whole_run(run: Run) -> None:
    process, result = trainings().get(run.folder), run.result()
    if process and result and process.exit_code is not None and not st.session_state.get(f"ended {run.name}"):
        st.session_state[f"ended {run.name}"] = True
        st.rerun()  # the whole page: nothing is left to follow
    outcome = result.get("outcome", "") if result else "running"
    kind = {"stopped_early": st.success, "diverged": st.error, "interrupted": st.warning}.get(outcome, st.info)
    kind(run.verdict())
    for line in run.damage():
        st.warning(line)
    if process and process.exit_code not in (None, 0):
        st.error(f"The trainer ended with exit code {process.exit_code}.")
        st.code("\n".join(run.log_lines()), language=None)
    elif process and process.exit_code is None:
        progress_of(run, process)
    history = run.history()
    if history is not None:
        show_numbers(run, history)
    left, right = st.columns([3, 2], gap="large")
    if history is not None:
        left.image(curves(run.folder, (run.folder / HISTORY_NAME).stat().st_size), width="stretch")
    with right:
        show_previews(run)


def progress_of(run: Run, process: TrainingProcess) -> None:
    left, right = st.columns([6, 1], vertical_alignment="center")
    lines = run.log_lines(1)
    left.caption(lines[0] if lines else "The trainer is starting ...")
    if right.button("Stop it", help="It ends its step and saves its state, so that --resume can carry on."):
        process.stop()


def show_numbers(run: Run, history: History) -> None:
    decision, result = decision_of(history), run.result() or {}
    total = result.get("total_steps") or history.header.get("total_steps")
    losses = [record["loss"] for record in history.records if record.get("loss") is not None]
    columns = st.columns(4)
    columns[0].metric("step", f"{history.last_step()} of {total}" if total else history.last_step())
    columns[1].metric("turning point", f"step {decision.keep_step}" if decision else "none yet")
    columns[2].metric("epoch", f"{history.records[-1].get('epoch') or 0:.1f}")
    columns[3].metric("training loss", f"{losses[-1]:.4f}" if losses else "-")


@st.cache_data(show_spinner=False, max_entries=8)
def curves(folder: Path, history_bytes: int) -> bytes:
    """PNG bytes: losses, CS and CS-Fluctuation. Drawn anew only when the history has grown."""
    history = Run("", folder).history()
    figure = draw(history, decision_of(history), history.header["window"], history.header["decided_on"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def show_previews(run: Run) -> None:
    from images.loading import open_image

    previews = run.previews()
    if not previews:
        return
    st.markdown("**Sample pictures over time**")
    prompts = prompts_of(run)
    for number in sorted({preview.number for preview in previews}):
        row = [preview for preview in previews if preview.number == number]
        if number < len(prompts):
            st.caption(f"{prompts[number]} · seed {row[0].seed}")
        with st.container(horizontal=True):
            for preview in row:
                try:
                    st.image(open_image(preview.path), caption=preview.moment, width=THUMBNAIL_PX)
                except (ValueError, OSError) as error:
                    st.caption(str(error))


def prompts_of(run: Run) -> list[str]:
    """The prompts that the run's previews were made of, as far as its folder holds them."""
    from base.sampling import read_prompts
    from demo.process import PROMPTS_NAME

    try:
        return [prompt.prompt for prompt in read_prompts(run.folder / PROMPTS_NAME)]
    except (ValueError, OSError):
        return []


def try_out(places: Places) -> None:
    st.title("Try it")
    run = choose_run(places, "tried")
    form, results = st.columns([2, 5], gap="large")
    weights = run.weights() if run else {}
    with form:
        bases = list(places.bases)
        own = places.base_of(run) if run else None
        if run and run.settings() and own is None:
            st.warning("This run was trained on a base that the page was not started with: add it with --base.")
        base = st.selectbox("Base", bases, index=bases.index(own) if own else 0)
        lora = st.selectbox("LoRA", list(weights), placeholder="none yet", index=0 if weights else None)
        strength = st.slider("Strength", 0.0, 2.0, 1.0, 0.05)
        known = prompts_of(run) if run else []
        prompt = st.text_area("Prompt", known[0] if known else "", height=90)
        negative = st.text_input("Negative prompt")
        left, right = st.columns(2)
        seed = left.number_input("Seed", 0, 2**31 - 1, 1)
        steps = right.number_input("Steps", 1, 150, 20)
        scale = left.number_input("Guidance", 0.0, 30.0, 5.0, 0.5)
        side = right.number_input("Side (px, 0: the base's)", 0, 2048, 0, 8)
        one = st.button("Make a picture", width="stretch", disabled=not prompt)
        compare = st.button("Compare at this seed", type="primary", width="stretch", disabled=not prompt or not weights)
    if one or compare:
        picked = {"no LoRA": None, **{name: weights[name] for name in ("turning point", "last") if name in weights}}
        if one:
            picked = {lora: offered(weights, lora, "LoRA")} if lora else {"no LoRA": None}
        wanted = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "sample_steps": steps, "scale": scale}
        wanted.update(width=side or None, height=side or None)
        with results:
            make_pictures(places.base(base), run, picked, wanted, strength)
    with results:
        show_pictures()


def make_pictures(base: str, run: Run, picked: dict[str, Path | None], wanted: Any, strength: float) -> None:
    """A picture for each of {label: LoRA file or None}, into the session, newest first."""
    from base.sampling import Prompt
    from grid.pictures import png_with_settings

    group = []
    try:
        refuse_picture({**wanted, "strength": strength})
        maker = maker_of(run, base)
        with st.spinner("Drawing ..."):
            for label, lora in picked.items():
                picture = maker.picture(Prompt(**wanted), lora, strength)
                facts = {**wanted, "base": base, "lora": lora.name if lora else "none", "strength": strength}
                group.append((label, png_with_settings(picture, facts)))
    except (ValueError, OSError) as error:
        st.error(str(error))
        return
    title = f"{wanted['prompt']} · seed {wanted['seed']} · {wanted['sample_steps']} steps · strength {strength:g}"
    st.session_state["pictures"] = [(title, group), *st.session_state.get("pictures", [])][:MOST_GROUPS]


def choose_by_grid(places: Places) -> None:
    st.title("Choose by a grid")
    run = choose_run(places, "grid")
    if run is None:
        return
    base = places.base_of(run)
    if base is None:
        st.warning("The base of this run is not known, or the page was not started with it: add it with --base.")
        return
    prompts = st.text_area("Prompts, one a line", "\n".join(prompts_of(run)) or EXAMPLE_PROMPT, height=90)
    left, right = st.columns(2)
    seeds, strengths = left.text_input("Seeds", "1,2,3"), right.text_input("Strengths", "1")
    if st.button("Draw the grid", type="primary"):
        with st.spinner("Drawing every checkpoint ..."):
            st.session_state["grid"] = (run.name, draw_grid(places, run, places.base(base), prompts, seeds, strengths))
    drawn_of, html = st.session_state.get("grid", ("", ""))
    if drawn_of == run.name:
        st.download_button("Download the page", html, f"{run.folder.name}-grid.html", "text/html")
        st.iframe(html, height=900)


def draw_grid(places: Places, run: Run, base: str, prompts: str, seeds: str, strengths: str) -> str:
    """HTML of the grid that the form asks for. Raises ValueError for what is not allowed."""
    from demo.grid_page import MOST_SEEDS, MOST_STRENGTHS, asked_numbers, asked_prompts, run_grid

    asked = asked_prompts(prompts)
    columns = asked_numbers(seeds, "seed", MOST_SEEDS), asked_numbers(strengths, "strength", MOST_STRENGTHS)
    return run_grid(run, places, base, maker_of(run, base), asked, columns)


def maker_of(run: Run | None, base: str) -> Any:
    """What makes pictures with a base as a run was trained on it."""
    settings = run.settings() if run else {}
    clip_skip = settings.get("clip_skip") if isinstance(settings.get("clip_skip"), int) else None
    return picture_maker(base, bool(settings.get("v2")), bool(settings.get("v_parameterization")), clip_skip)


def show_pictures() -> None:
    made = st.session_state.get("pictures", [])
    if not made:
        st.caption(
            "Pictures appear here. A comparison shows no LoRA, the turning point and the last weights at one seed."
        )
    for number, (title, group) in enumerate(made):
        st.caption(title)
        for column, (label, png) in zip(st.columns(max(3, len(group))), group):
            column.image(png, caption=label, width="stretch")
            key = f"{len(made) - number} {label}"
            column.download_button(
                "Download", png, f"{label.replace(' ', '-')}-{len(made) - number}.png", "image/png", key=key
            )


def start(places: Places) -> None:
    st.title("Start a training")
    settings = ask_settings(places)
    stamp = st.session_state.setdefault("stamp", time.strftime("%Y%m%d-%H%M%S"))
    folder = places.roots[0] / f"{settings.name}-{stamp}"
    try:
        words = command(settings, places, folder)
    except ValueError as error:
        st.error(str(error))
        return
    pressed = st.button("Start", type="primary")
    st.caption("The command that will run")
    st.code(shlex.join(words), language="bash", wrap_lines=True)
    running = sum(process.exit_code is None for process in trainings().values())
    if pressed and running >= MOST_RUNNING:
        st.error(f"{running} trainings run already: wait for one, or stop one")
    elif pressed:
        try:
            trainings()[folder] = TrainingProcess(settings, places, folder)
        except OSError as error:
            st.error(f"It could not be started: {error}")
            return
        del st.session_state["stamp"]
        st.session_state["run"] = places.name_of(folder)
        st.switch_page(PAGES["Watch"])


def ask_settings(places: Places) -> TrainingSettings:
    """TrainingSettings as the form has them, not checked yet."""
    left, middle, right = st.columns(3)
    name = left.text_input("Name", "my-lora")
    base = left.selectbox("Base", list(places.bases))
    images = left.selectbox("Pictures", list(places.images))
    usual_px = 64 if base == EMBEDDED else 1024 if is_sdxl_base(places.base(base)) else 512
    resolution = left.number_input(
        "Resolution (px)", *LIMITS["resolution_px"], usual_px, 64, key=f"resolution {usual_px}"
    )
    rank = middle.number_input("Rank", *LIMITS["rank"], 16)
    alpha = middle.number_input("Alpha", 0.0, 1024.0, 16.0)
    unet_rate = middle.number_input("Learning rate, U-Net", 0.0, 1.0, 1e-3, 1e-4, format="%.2e")
    text_rate = middle.number_input(
        "Learning rate, text encoder", 0.0, 1.0, 1e-4, 1e-5, format="%.2e", help="0: not trained"
    )
    epochs = right.number_input("Epochs at most", *LIMITS["epochs"], 15)
    batch_size = right.number_input("Pictures a step", *LIMITS["batch_size"], 2)
    precision = right.selectbox("Precision", PRECISIONS, help="fp16 or bf16 on a GPU")
    seed = right.number_input("Seed", *LIMITS["seed"], 1337)
    early_stop = right.toggle("Stop at the turning point", True)
    prompts = st.text_area("Prompts for sample pictures, one a line", EXAMPLE_PROMPT, height=80)
    with st.expander("More"):
        left, middle, right = st.columns(3)
        rule = left.selectbox("Stop rule", OFFERED_RULES, help="the first is the default; shadow takes more time")
        pictures = left.number_input("Pictures every N epochs (0: at the end)", *LIMITS["pictures_every_epochs"], 0)
        interval = middle.number_input("Steps between measurements (0: automatic)", *LIMITS["cs_interval"], 0)
        window = right.number_input("Measurements a window (0: automatic)", *LIMITS["window"], 0)
    return TrainingSettings(
        name, base, images, prompts, resolution, rank, alpha, epochs, batch_size, unet_rate, text_rate, pictures,
        early_stop, interval, window, precision, seed, rule,
    )  # fmt: skip


PAGES = {}


def main() -> None:
    st.set_page_config(page_title="ES-LoRA", page_icon="◔", layout="wide")
    st.set_option("client.toolbarMode", "minimal")
    st.html(STYLE)
    try:
        places = parse_places()
    except ValueError as error:
        st.error(str(error))
        return
    for title, show, icon in (
        ("Watch", watch, "timeline"),
        ("Try", try_out, "palette"),
        ("Grid", choose_by_grid, "grid_view"),
        ("Start", start, "play_circle"),
    ):
        page = st.Page(lambda show=show: show(places), title=title, url_path=title.lower(), icon=f":material/{icon}:")
        PAGES[title] = page
    page = st.navigation(list(PAGES.values()), position="top")
    try:
        page.run()
    except (ValueError, OSError) as error:  # such as a name that was not offered
        st.error(str(error))


if __name__ == "__main__":
    main()
