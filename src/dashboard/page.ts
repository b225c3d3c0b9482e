// Serves the page at `/`: files that are inside the executable. They hold no secrets and need no key; what the
// page then asks of the API does. Nothing is loaded from elsewhere, and the browser is told to refuse it.

import clusterProgram from "./cluster.client.js" with { type: "text" };
import figuresProgram from "./figures.client.js" with { type: "text" };
import ledgerProgram from "./ledger.client.js" with { type: "text" };
import markdownProgram from "./markdown.client.js" with { type: "text" };
import modelsProgram from "./models.client.js" with { type: "text" };
import pageProgram from "./page.client.js" with { type: "text" };
import pageStyle from "./page.css" with { type: "text" };
import pageHtml from "./page.html" with { type: "text" };
import requestsProgram from "./requests.client.js" with { type: "text" };
import turnProgram from "./turn.client.js" with { type: "text" };

const SECURITY_HEADERS = {
  "content-security-policy":
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cache-control": "no-cache",
};

/** Paths of the page, and what each gives. */
export const PAGE_FILES: Record<string, () => Response> = {
  "/": () => file(String(pageHtml), "text/html"),
  "/page.css": () => file(String(pageStyle), "text/css"),
  "/page.js": () => file(String(pageProgram), "text/javascript"),
  "/cluster.js": () => file(String(clusterProgram), "text/javascript"),
  "/ledger.js": () => file(String(ledgerProgram), "text/javascript"),
  "/markdown.js": () => file(String(markdownProgram), "text/javascript"),
  "/models.js": () => file(String(modelsProgram), "text/javascript"),
  "/figures.js": () => file(String(figuresProgram), "text/javascript"),
  "/requests.js": () => file(String(requestsProgram), "text/javascript"),
  "/turn.js": () => file(String(turnProgram), "text/javascript"),
};

function file(text: string, type: string): Response {
  return new Response(text, { headers: { ...SECURITY_HEADERS, "content-type": `${type}; charset=utf-8` } });
}
