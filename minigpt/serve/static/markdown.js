// A small part of Markdown as DOM nodes: code blocks, inline code, bold, headings, lists, paragraphs.
// What a model says is text. It reaches the page through textContent only; there is no HTML, no link and no image.

function inline(parent, text) {
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (!part) continue;
    const code = part.length > 2 && part.startsWith("`") && part.endsWith("`");
    const bold = part.length > 4 && part.startsWith("**") && part.endsWith("**");
    if (!code && !bold) {
      parent.append(part);
      continue;
    }
    const node = document.createElement(code ? "code" : "strong");
    node.textContent = code ? part.slice(1, -1) : part.slice(2, -2);
    parent.append(node);
  }
}

const ITEM = /^\s{0,3}(?:([-*+])|(\d{1,4})[.)])\s+(.*)$/;

export function render(text) {
  const out = document.createDocumentFragment();
  const lines = text.replace(/^\s*\n/, "").split("\n");
  let paragraph = null, list = null, ordered = false;
  const close = () => { paragraph = list = null; };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(/^\s{0,3}```\s*([\w+#.-]*)\s*$/);
    if (fence) {
      close();
      const body = [];
      while (++i < lines.length && !/^\s{0,3}```\s*$/.test(lines[i])) body.push(lines[i]);
      const block = document.createElement("pre"), code = document.createElement("code");
      if (fence[1]) block.dataset.language = fence[1];
      code.textContent = body.join("\n");
      block.append(code);
      out.append(block);
      continue;
    }
    const heading = line.match(/^#{1,6}\s+(.*)$/), item = line.match(ITEM);
    if (!line.trim()) {
      close();
    } else if (heading) {
      close();
      const node = document.createElement("p");
      node.className = "heading";
      inline(node, heading[1]);
      out.append(node);
    } else if (item) {
      paragraph = null;
      if (!list || ordered !== Boolean(item[2])) {
        ordered = Boolean(item[2]);
        list = document.createElement(ordered ? "ol" : "ul");
        if (ordered) list.start = Number(item[2]);
        out.append(list);
      }
      const node = document.createElement("li");
      inline(node, item[3]);
      list.append(node);
    } else {
      list = null;
      if (paragraph) paragraph.append(document.createElement("br"));
      else out.append((paragraph = document.createElement("p")));
      inline(paragraph, line);
    }
  }
  return out;
}
