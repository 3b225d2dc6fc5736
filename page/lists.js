/*
 * The lists of buttons: the bars, the digits of the drawing, the digits that are misread. A list is one stop of the
 * tabulator key; in it the arrow keys, Home and End move, and press.
 */

/** Lets the keys move in a list, and calls press(number) for the button that is pressed or moved to. */
function makeList(list, press) {
  const buttons = () => [...list.children];
  const stopAt = (number) => buttons().forEach((button, i) => (button.tabIndex = i === number ? 0 : -1));
  list.addEventListener("click", (event) => {
    const number = buttons().indexOf(event.target.closest("button"));
    if (number < 0) return;
    stopAt(number);
    press(number);
  });
  list.addEventListener("keydown", (event) => {
    const here = buttons().indexOf(document.activeElement);
    const last = buttons().length - 1;
    const [before, after] = [Math.max(here - 1, 0), Math.min(here + 1, last)];
    const places = { ArrowRight: after, ArrowDown: after, ArrowLeft: before, ArrowUp: before, Home: 0, End: last };
    const next = places[event.key];
    if (next === undefined) return;
    event.preventDefault(); // or the page would scroll
    if (next === here) return;
    buttons()[next].focus();
    buttons()[next].click();
  });
  stopAt(0);
}

/** A button with these children, elements or texts, for a list. */
function makeButton(...children) {
  const button = document.createElement("button");
  button.type = "button";
  button.tabIndex = -1;
  button.append(...children);
  return button;
}

/** An element of this kind and class, with children. */
function make(kind, className, ...children) {
  const node = document.createElement(kind);
  node.className = className;
  node.append(...children);
  return node;
}

/** The ten bars; press(digit) is called for the one that is pressed. */
function makeBars(list, press) {
  for (let digit = 0; digit < 10; digit++) {
    const track = make("span", "track", make("span", "bar"));
    list.append(makeButton(make("b", "", String(digit)), track, make("span", "value")));
  }
  makeList(list, press);
}

/** The ten bars show the logarithms of probabilities, or nothing. `asked` is the digit that the evidence is for. */
function showBars(list, logProbabilities, asked) {
  const most = logProbabilities?.indexOf(Math.max(...logProbabilities));
  [...list.children].forEach((button, digit) => {
    const probability = logProbabilities ? Math.exp(logProbabilities[digit]) : 0;
    button.style.setProperty("--share", probability);
    button.classList.toggle("most", digit === most);
    button.setAttribute("aria-pressed", digit === asked);
    button.querySelector(".value").textContent = logProbabilities ? (100 * probability).toFixed(1) : "";
  });
}

/** A button for each digit of the drawing, with its field. */
function showDigits(list, digits, looked) {
  while (list.children.length > digits.length) list.lastChild.remove();
  while (list.children.length < digits.length) list.append(makeButton(document.createElement("canvas")));
  digits.forEach((digit, i) => {
    const button = list.children[i];
    paintField(button.firstChild, digit.field);
    button.setAttribute("aria-label", `Look at ${digit.value}`);
    button.setAttribute("aria-pressed", digit === looked);
    button.tabIndex = digit === looked ? 0 : -1;
  });
}

/** The field (28 * 28) of a misread digit, in [0, 1]. */
function misreadField(data, number) {
  const area = SIDE * SIDE;
  return Float32Array.from(bytes(data.images).subarray(area * number, area * (number + 1)), (value) => value / 255);
}

/** A button for each misread digit; press(number) is called for the one that is pressed. */
function makeMisread(list, data, press) {
  data.misread.forEach(({ label, reading }) => {
    const button = makeButton(document.createElement("canvas"), `${label} → ${reading}`);
    button.setAttribute("aria-label", `Labelled ${label}, read as ${reading}`);
    list.append(button);
  });
  const [misread, scored] = [data.misreadCount, data.scored].map((count) => count.toLocaleString("en"));
  const note = data.misread.length < data.misreadCount ? `, of which ${data.misread.length} are here` : "";
  element("misread-count").textContent = `${misread} of the ${scored} digits that it was scored on${note}.`;
  list.parentElement.hidden = data.misread.length === 0;
  makeList(list, press);
}

/** Draws the misread digits in the colours of the page. */
function paintMisread(list, data) {
  [...list.children].forEach((button, i) => paintField(button.firstChild, misreadField(data, i)));
}

/** Marks the misread digit that is shown, if one is. */
function showMisread(list, shown) {
  [...list.children].forEach((button, i) => button.setAttribute("aria-pressed", i === shown));
}
