// GET /health: the process answers. Nothing else is looked at, and no key is asked for: it is for supervisors, and for
// tools on this machine that look for their node by its id.

export function healthRoute(node: string | undefined) {
  return (): Response => Response.json({ status: "ok", ...(node === undefined ? {} : { node }) });
}
