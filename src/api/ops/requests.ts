// GET /requests and /requests/{id}: what happened to generation requests, by the id in x-request-id.

import { CaravanError } from "../../errors.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";

const LISTED = 100;

export function listRequestsRoute({ traces }: ApiDependencies) {
  return (): Response => Response.json({ object: "list", data: traces.list(LISTED) });
}

export function requestRoute({ traces }: ApiDependencies) {
  return (context: ApiContext): Response => {
    const id = context.req.param("id") ?? "";
    const trace = traces.get(id);
    if (trace === undefined) {
      throw new CaravanError("request_not_found", `No generation request ${JSON.stringify(id)} is known.`, {
        hint: "The last 1000 are kept, by the x-request-id of their replies, until the node stops.",
      });
    }
    return Response.json(trace);
  };
}
