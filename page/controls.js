/*
 * What a person does: writing, the buttons and the keys. The state is here; update() reads and shows it.
 */

const data = JSON.parse(element("data").textContent);
const net = unpack(data);
const pad = element("pad");
const HEIGHT = 3 / 4; // of the drawing area, in its widths
const noMaps = forward(net, new Float32Array(SIDE * SIDE)).maps;
for (const maps of noMaps) maps.data.fill(0);

const state = {
  strokes: [], // in the order in which they were written
  misread: null, // the number of the misread digit that is shown instead, or null
  looked: null, // the number of the digit that is looked at, or null: the one written last
  asked: null, // the digit that the evidence is for, or null: the one that is read
};

/** What the network makes of a field: the digit that it reads, its probability, and what forward() returns. */
function classifyField(field) {
  const result = forward(net, field);
  const most = Math.max(...result.logProbabilities);
  return { field, value: result.logProbabilities.indexOf(most), probability: Math.exp(most), ...result };
}

/** The same for strokes. What was asked lately is kept, as only one stroke grows at a time. */
const kept = new Map();
function classifyStrokes(strokes) {
  const key = JSON.stringify(strokes);
  if (kept.size > 100 && !kept.has(key)) kept.clear();
  if (!kept.has(key)) kept.set(key, classifyField(makeField(strokes)));
  return kept.get(key);
}

/** Reads the strokes, or the misread digit, and shows what is read. */
function update() {
  const field = state.misread === null ? null : misreadField(data, state.misread);
  const lines = field ? [[classifyField(field)]] : readStrokes(state.strokes, classifyStrokes);
  const digits = lines.flat();
  const last = state.strokes[state.strokes.length - 1];
  const looked = digits[state.looked] || digits.find(({ strokes }) => strokes?.includes(last)) || digits[0];
  const asked = state.asked ?? looked?.value;

  paintPad(pad, state.strokes, digits, looked, field);
  const text = lines.map((line) => line.map(({ value }) => value).join(" ")).join(" / ");
  if (element("answer").textContent !== text) element("answer").textContent = text; // or it would be said again
  showHint(element("hint"), field ? data.misread[state.misread].label : null, !digits.length);
  showDigits(element("digits"), digits, looked);
  showBars(element("bars"), looked?.logProbabilities, asked);
  showInside(looked, asked, looked?.maps ?? noMaps);
  showMisread(element("misread"), state.misread);
}

/** Changes the state, and shows it when the screen is next drawn. */
let isDue = false;
function change(changes) {
  Object.assign(state, changes);
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    update();
  });
}

/** A stroke begins. In the place of a misread digit it begins a new drawing. */
function begin(stroke) {
  const before = state.misread === null ? state.strokes : [];
  change({ strokes: [...before, stroke], misread: null, looked: null });
}

const clear = () => change({ strokes: [], misread: null, looked: null, asked: null });

/** Takes the misread digit away, or else the last stroke. */
function undo() {
  const strokes = state.misread === null ? state.strokes.slice(0, -1) : state.strokes;
  change({ strokes, misread: null, looked: null });
}

/** Where the pointer is in the drawing area, in its widths. */
function pointOf(event) {
  const { left, top, width } = pad.getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / width];
}

// One pointer writes at a time, so that a palm or a second finger does not. A pen comes before a finger.
let pen = null; // { id, type, stroke } of the pointer that writes

pad.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || (pen && !(event.pointerType === "pen" && pen.type === "touch"))) return;
  if (pen) undo();
  pen = { id: event.pointerId, type: event.pointerType, stroke: [pointOf(event)] };
  begin(pen.stroke);
  pad.setPointerCapture(pen.id);
});
pad.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pen?.id) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const point of (events.length ? events : [event]).map(pointOf)) {
    const [x, y] = pen.stroke[pen.stroke.length - 1];
    if (Math.hypot(point[0] - x, point[1] - y) > 0.002) pen.stroke.push(point);
  }
  change({});
});
for (const type of ["pointerup", "pointercancel"]) {
  pad.addEventListener(type, (event) => {
    if (event.pointerId !== pen?.id) return;
    if (type === "pointercancel") undo(); // the device took it for something else
    pen = null;
  });
}

element("clear").addEventListener("click", clear);
element("undo").addEventListener("click", undo);
window.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "Escape") clear();
  else if (/^[0-9]$/.test(event.key)) {
    const before = state.misread === null ? state.strokes : [];
    change({ strokes: withSample(before, Number(event.key), HEIGHT), misread: null, looked: null });
  } else return;
  event.preventDefault();
});

makeBars(element("bars"), (digit) => change({ asked: state.asked === digit ? null : digit }));
makeList(element("digits"), (number) => change({ looked: number, asked: null }));
makeMisread(element("misread"), data, (number) => {
  change({ misread: number, looked: null, asked: null });
  pad.scrollIntoView({ block: "nearest" });
});
makeMaps(element("maps"), noMaps);
readColours();
paintMisread(element("misread"), data);
new ResizeObserver(() => change({})).observe(pad);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  paintMisread(element("misread"), data);
  update();
});
update();
