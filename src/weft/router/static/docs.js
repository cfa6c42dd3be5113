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

// Text whose `words` in backticks are shown as code.
function prose(text) {
  return (text || "").split("`").map((part, place) => (place % 2 ? make("code", {}, part) : part));
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

// What the data of a server-sent event holds.
function eventSchema(schema) {
  const data = schema.properties.data;
  return (data.anyOf ? data.anyOf[0] : data).contentSchema;
}

// One table per type that a body, an answer or an event may have; its name where there are several.
function tablesOf(spec, schema) {
  if (!schema.anyOf) return [fieldsTable(spec, schema)];
  return schema.anyOf.map((type) => make("div", {}, make("p", { class: "what" }, typeName(type)), fieldsTable(spec, type)));
}

function rowOf(name, isRequired, type, note) {
  const label = make("td", isRequired ? { class: "required" } : {}, name);
  return make("tr", {}, label, make("td", { class: "type" }, type), make("td", {}, ...prose(note)));
}

function fieldsTable(spec, schema) {
  const shown = resolve(spec, schema.type === "array" ? schema.items : schema) || {};
  const required = new Set(shown.required || []);
  const rows = Object.entries(shown.properties || {}).map(([name, field]) => {
    const note = [field.description, rangeOf(field)].filter(Boolean).join(" · ");
    return rowOf(name, required.has(name), typeNode(spec, field), note);
  });
  return rows.length ? make("table", {}, make("tbody", {}, ...rows)) : make("p", { class: "what" }, typeName(schema));
}

// The name of a field's type. Types of objects open on a click, made only then: they may hold themselves.
function typeNode(spec, field) {
  const inner = (field.anyOf || [field]).map((kind) => (kind.type === "array" ? kind.items || {} : kind));
  const objects = inner.flatMap((kind) => kind.anyOf || [kind]).filter((kind) => (resolve(spec, kind) || {}).properties);
  if (!objects.length) return typeName(field);
  const node = make("details", {}, make("summary", {}, typeName(field)));
  node.addEventListener("toggle", () => {
    if (node.childElementCount === 1) for (const kind of objects) node.append(...tablesOf(spec, kind));
  });
  return node;
}

function parametersTable(parameters) {
  const rows = parameters.map((one) =>
    rowOf(one.name, one.required, `${one.in} · ${typeName(one.schema)}`, one.description));
  return make("table", {}, make("tbody", {}, ...rows));
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
  if (body === null) return method === "GET" ? `curl '${url}'` : `curl -X ${method} '${url}'`;
  return `curl ${url} -H 'Content-Type: ${JSON_TYPE}' -d '${body.replaceAll("'", "'\\''")}'`;
}

// One field per parameter, and the address that they make.
function parameterForm(path, parameters) {
  const fields = parameters.map((one) => [one, make("input", { "aria-label": one.name, placeholder: one.name })]);
  const target = () => {
    let filled = path;
    const query = new URLSearchParams();
    for (const [one, field] of fields) {
      const value = field.value;
      if (one.in === "path") filled = filled.replace(`{${one.name}}`, encodeURIComponent(value).replaceAll("%2F", "/"));
      else if (value) query.set(one.name, value);
    }
    const end = query.size ? `?${query}` : "";
    return (filled.replace(/^\//, "") || "./") + end;
  };
  return [make("p", { class: "parameters" }, ...fields.map(([, field]) => field)), target];
}

function tryForm(path, method, media, parameters) {
  const [form, target] = parameterForm(path, parameters);
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
      await send(target(), method, input ? input.value : null, output, status, running.signal);
    } catch (error) {
      status.textContent = error.name === "AbortError" ? "stopped" : String(error);
    } finally {
      running = null;
      run.textContent = "Send";
    }
  });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(curlOf(target(), method, input ? input.value : null));
    status.textContent = "copied";
  });
  return make("div", {}, ...(parameters.length ? [form] : []), ...(input ? [input] : []), make("p", {}, run, copy, status), output);
}

function routeCard(spec, path, method, operation) {
  const media = operation.requestBody && operation.requestBody.content[JSON_TYPE];
  const answers = (operation.responses["200"] && operation.responses["200"].content) || {};
  const summary = make(
    "summary", {},
    make("span", { class: `method ${method}` }, method.toUpperCase()),
    make("span", { class: "path" }, path),
    make("span", { class: "what" }, ...prose(operation.summary)),
  );
  const body = make("div");
  const card = make("details", { class: "route", id: operation.operationId }, summary, body);
  card.addEventListener("toggle", () => {
    if (body.childElementCount) return;
    const parameters = operation.parameters || [];
    if (parameters.length) body.append(make("h3", {}, "Parameters"), parametersTable(parameters));
    if (media) body.append(make("h3", {}, "Body"), ...tablesOf(spec, media.schema));
    if (answers[JSON_TYPE]) body.append(make("h3", {}, "Answer"), ...tablesOf(spec, answers[JSON_TYPE].schema));
    if (answers[STREAM]) {
      body.append(make("h3", {}, "Events of a stream"), ...tablesOf(spec, eventSchema(answers[STREAM].schema)));
    }
    const errors = Object.entries(operation.responses).filter(([code]) => code !== "200");
    if (errors.length) {
      const rows = errors.map(([code, answer]) =>
        rowOf(code, false, typeNode(spec, answer.content[JSON_TYPE].schema), answer.description));
      body.append(make("h3", {}, "Errors"), make("table", {}, make("tbody", {}, ...rows)));
    }
    body.append(make("h3", {}, "Try it"), tryForm(path, method.toUpperCase(), media, parameters));
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
        link.addEventListener("click", () => { card.open = true; });  // also when the address names it already
        contents.append(link);
        section.append(card);
      }
    }
    document.getElementById("routes").append(section);
  }
  openLinked();
}

// The route that the address names, also when it changes later.
function openLinked() {
  const card = document.getElementById(location.hash.slice(1));
  if (!card || card.tagName !== "DETAILS") return;
  card.open = true;
  card.scrollIntoView();
}

addEventListener("hashchange", openLinked);

fetch("openapi.json")
  .then((response) => response.json())
  .then(show)
  .catch((error) => { document.getElementById("routes").textContent = `openapi.json cannot be read: ${error}`; });
