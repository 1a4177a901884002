// SPDX-License-Identifier: Apache-2.0
/* One object, so that both levels share the maps of services without a pinned file. */
#include "services.c"

#include "sockmap.c"

#include "packets.c"

#include "errors.c"

#include "masquerade.c"

#include "hooks.c"

#include "redirect.c"
