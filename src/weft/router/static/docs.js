// Shows openapi.json and lets one try the routes. No dependencies; text goes into the page as text, never as HTML.
"use strict";

const STREAM = "text/event-stream";
const JSON_TYPE = "application/json";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function resolve(spec, schema) {
  return schema && schema.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema;
}

function typeName(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeName).filter((name) => name !== "null").join(" or ");
  if (schema.type === "array") return `array of ${typeName(schema.items) || "anything"}`;
  if (schema.type === "object" && schema.additionalProperties) return `map to ${typeName(schema.additionalProperties)}`;
  return schema.type || "anything";
}

function rangeOf(schema) {
  const parts = [schema, ...(schema.anyOf || [])];
  const find = (name) => parts.map((part) => part[name]).find((value) => value !== undefined);
  const low = find("minimum"), high = find("maximum");
  return [low !== undefined ? `≥ ${low}` : "", high !== undefined ? `≤ ${high}` : ""].filter(Boolean).join(", ");
}

// What the data of a server-sent event holds: one table per type that it may have.
function eventTables(spec, schema) {
  const data = schema.properties.data;
  const content = (data.anyOf ? data.anyOf[0] : data).contentSchema;
  const types = content.anyOf || [content];
  return types.map((type) => make("div", {}, make("p", { class: "what" }, typeName(type)), fieldsTable(spec, type)));
}

function fieldsTable(spec, schema) {
  const shown = resolve(spec, schema.type === "array" ? schema.items : schema) || {};
  const required = new Set(shown.required || []);
  const rows = Object.entries(shown.properties || {}).map(([name, field]) => {
    const label = make("td", required.has(name) ? { class: "required" } : {}, name);
    const note = [field.description, rangeOf(field)].filter(Boolean).join(" · ");
    return make("tr", {}, label, make("td", { class: "type" }, typeName(field)), make("td", {}, note));
  });
  return rows.length ? make("table", {}, make("tbody", {}, ...rows)) : make("p", { class: "what" }, typeName(schema));
}

async function send(path, method, body, output, status, signal) {
  const key = document.getElementById("key").value;
  const headers = body === null ? {} : { "Content-Type": JSON_TYPE };
  if (key) headers.Authorization = `Bearer ${key}`;
  const began = performance.now();
  const response = await fetch(path, { method, headers, body, signal });
  const describe = () => `${response.status} · ${((performance.now() - began) / 1000).toFixed(2)} s · ${response.headers.get("x-request-id") || ""}`;
  status.textContent = describe();
  status.classList.toggle("bad", !response.ok);
  output.textContent = "";
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    output.textContent += decoder.decode(part.value, { stream: true });
    status.textContent = describe();
  }
  if ((response.headers.get("content-type") || "").startsWith(JSON_TYPE)) {
    output.textContent = JSON.stringify(JSON.parse(output.textContent), null, 2);
  }
}

function curlOf(path, method, body) {
  const url = new URL(path, location.href).href;
  if (body === null) return `curl ${url}`;
  return `curl ${url} -H 'Content-Type: ${JSON_TYPE}' -d '${body.replaceAll("'", "'\\''")}'`;
}

function tryForm(path, method, media) {
  const target = path.replace(/^\//, "") || "./";
  const input = media ? make("textarea", { spellcheck: "false", "aria-label": "Body" }) : null;
  if (input) input.value = JSON.stringify(media.example || {}, null, 2);
  const output = make("pre", { hidden: "" });
  const status = make("span", { class: "status" });
  const run = make("button", { type: "button" }, "Send");
  const copy = make("button", { type: "button", class: "plain" }, "Copy as curl");
  let running = null;
  run.addEventListener("click", async () => {
    if (running) return running.abort();
    running = new AbortController();
    run.textContent = "Stop";
    output.hidden = false;
    try {
      await send(target, method, input ? input.value : null, output, status, running.signal);
    } catch (error) {
      status.textContent = error.name === "AbortError" ? "stopped" : String(error);
    } finally {
      running = null;
      run.textContent = "Send";
    }
  });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(curlOf(target, method, input ? input.value : null));
    status.textContent = "copied";
  });
  return make("div", {}, ...(input ? [input] : []), make("p", {}, run, copy, status), output);
}

function routeCard(spec, path, method, operation) {
  const media = operation.requestBody && operation.requestBody.content[JSON_TYPE];
  const answers = (operation.responses["200"] && operation.responses["200"].content) || {};
  const summary = make(
    "summary", {},
    make("span", { class: `method ${method}` }, method.toUpperCase()),
    make("span", { class: "path" }, path),
    make("span", { class: "what" }, operation.summary),
  );
  const body = make("div");
  const card = make("details", { class: "route", id: operation.operationId }, summary, body);
  card.addEventListener("toggle", () => {
    if (body.childElementCount) return;
    if (media) body.append(make("h3", {}, "Body"), fieldsTable(spec, media.schema));
    if (answers[JSON_TYPE]) body.append(make("h3", {}, "Answer"), fieldsTable(spec, answers[JSON_TYPE].schema));
    if (answers[STREAM]) body.append(make("h3", {}, "Events of a stream"), ...eventTables(spec, answers[STREAM].schema));
    const errors = Object.entries(operation.responses).filter(([code]) => code !== "200");
    if (errors.length) {
      const rows = errors.map(([code, answer]) => make("tr", {}, make("td", {}, code), make("td", {}, answer.description)));
      body.append(make("h3", {}, "Errors"), make("table", {}, make("tbody", {}, ...rows)));
    }
    if (!path.includes("{")) body.append(make("h3", {}, "Try it"), tryForm(path, method.toUpperCase(), media));
  });
  return card;
}

function show(spec) {
  document.getElementById("title").textContent = `${spec.info.title} ${spec.info.version}`;
  document.getElementById("description").textContent = spec.info.description;
  for (const tag of spec.tags) {
    const section = make("section", { class: "tag" }, make("h2", {}, tag.name));
    const contents = document.getElementById("contents");
    contents.append(make("h2", {}, tag.name));
    for (const [path, methods] of Object.entries(spec.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        if (!operation.tags.includes(tag.name)) continue;
        const card = routeCard(spec, path, method, operation);
        const link = make("a", { href: `#${operation.operationId}` }, `${method.toUpperCase()} ${path}`);
        link.addEventListener("click", () => { card.open = true; });
        contents.append(link);
        section.append(card);
      }
    }
    document.getElementById("routes").append(section);
  }
}

fetch("openapi.json")
  .then((response) => response.json())
  .then(show)
  .catch((error) => { document.getElementById("routes").textContent = `openapi.json cannot be read: ${error}`; });
