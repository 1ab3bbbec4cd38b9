// The page's brush: for each photo a canvas of strokes over its picture. `element`, `props`,
// `watch` and `trigger` come from Gradio; demo/marks.py says what the value is.

const COLOUR = "rgb(0, 114, 178)"; // SUPPORT of evaluation/pictures.py
const UNDONE = 20; // strokes that can be taken back

const board = element.querySelector(".board");
const breadth = element.querySelector(".breadth");
let sent = null; // the value that was set here, not by the server

function tool() {
  return element.querySelector(".tools input:checked").value;
}

function send(stroked = null, stroke = null) {
  const marks = [...board.children].map((card) => ({
    key: card.dataset.key,
    mask: card.querySelector("canvas").toDataURL("image/png"),
    stroke: card.dataset.key === stroked ? stroke : null,
  }));
  props.value = sent = JSON.stringify(marks);
}

function build(value) {
  board.replaceChildren(...JSON.parse(value || "[]").map(card));
  board.classList.remove("waiting");
}

function card(given) {
  const figure = document.createElement("figure");
  figure.dataset.key = given.key;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [given.width, given.height];
  const sheet = document.createElement("div");
  sheet.style.backgroundImage = `url("${given.photo}")`;
  sheet.append(canvas);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Mark the object in ${given.name}`);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const before = [];
  const keep = () => {
    before.push(pen.getImageData(0, 0, canvas.width, canvas.height));
    if (before.length > UNDONE) before.shift();
  };
  if (given.mask) {
    const strokes = new Image();
    strokes.onload = () => pen.drawImage(strokes, 0, 0);
    strokes.src = given.mask;
  }
  followPointer(canvas, pen, keep, given.key);
  const name = document.createElement("span");
  name.textContent = name.title = given.name;
  const undo = button("Undo", () => {
    if (before.length) pen.putImageData(before.pop(), 0, 0);
    send();
  });
  const clear = button("Clear", () => {
    keep();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    send();
  });
  const caption = document.createElement("figcaption");
  caption.append(name, undo, clear);
  figure.append(sheet, caption);
  return figure;
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.onclick = act;
  return made;
}

function followPointer(canvas, pen, keep, key) {
  let points = null;
  const width = () => breadth.value * scale();
  const scale = () => canvas.width / canvas.getBoundingClientRect().width;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * scale(), (event.clientY - box.top) * scale()];
  };
  const draw = (from, to) => {
    const erases = tool() === "erase";
    pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
    pen.strokeStyle = COLOUR;
    pen.lineCap = "round";
    pen.lineWidth = width();
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0] + 0.01, to[1]); // a line without length isn't drawn
    pen.stroke();
  };
  canvas.onpointerdown = (event) => {
    if (event.button || board.classList.contains("waiting")) return;
    canvas.setPointerCapture(event.pointerId);
    keep();
    points = [at(event)];
    draw(points[0], points[0]);
  };
  canvas.onpointermove = (event) => {
    if (!points) return;
    points.push(at(event));
    draw(points.at(-2), points.at(-1));
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (!points) return;
    const stroke = { points, width: width() };
    points = null;
    if (tool() !== "object") return send();
    send(key, stroke);
    findObject();
  };
}

// The server finds the object around a stroke and sends all marks anew.
function findObject() {
  board.classList.add("waiting");
  setTimeout(() => board.classList.remove("waiting"), 10000); // it never answered
  setTimeout(() => trigger("select"), 50); // once the value has been taken
}

watch("value", () => {
  if (props.value !== sent) build(props.value);
});
build(props.value);
