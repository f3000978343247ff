"use strict";
const answers = document.getElementById("answers");
const chooser = document.getElementById("files");

async function classify(file) {
  const figure = document.createElement("figure");
  const picture = figure.appendChild(document.createElement("img"));
  const caption = figure.appendChild(document.createElement("figcaption"));
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  caption.textContent = "…";
  answers.prepend(figure);
  try {
    const answer = await fetch("/classify", {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    const found = await answer.json();
    caption.textContent = answer.ok
      ? found.slice(0, 3).map(([name, share]) => `${name} ${(100 * share).toFixed(0)} %`).join(", ")
      : found.error;
  } catch (error) {
    caption.textContent = `no answer (${error.message}); is innerloop demo --serve still running?`;
  }
}

const all = async (files) => { for (const file of [...files]) await classify(file); };
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); all(event.dataTransfer.files); });
chooser.addEventListener("change", () => all(chooser.files));
