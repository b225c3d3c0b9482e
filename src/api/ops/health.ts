// GET /health: the process answers. Nothing else is looked at, and no key is asked for: it is for supervisors.

export function healthRoute() {
  return (): Response => Response.json({ status: "ok" });
}
