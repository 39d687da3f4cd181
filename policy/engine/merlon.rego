# Decides a call by the grants in data.merlon and by the policy's own Rego in
# data.authz and data.envoy.authz. It is part of every policy bundle, so that
# any OPA which loads one can answer data.merlon.decision:
#
#   {"allow": bool, "reason": string, "rule_id": string, "dry_run": [grant ID]}
#
# The input has the shape of opa-envoy-plugin, and optionally "protocol"
# (http, grpc or tcp), which the enforcement point sets. What the data means
# is said in policy/grant, whose plain matcher is tested to agree.
#
# policy/engine checks identity and path by itself, looks the leaves of the
# index up, and enters at answer.
package merlon

decision := refusal("NO_IDENTITY") if {
	source == ""
} else := refusal("BAD_REQUEST") if {
	ambiguous
} else := answer({
	"deny": [grant | some leaf in leaves; some grant in leaf.deny],
	"allow": [grant | some leaf in leaves; some grant in leaf.allow],
	"dry_run": [grant | some leaf in leaves; some grant in leaf.dry_run],
	"path": path,
	"method": method,
	"rego": true,
})

refusal(reason) := {"allow": false, "reason": reason, "rule_id": "", "dry_run": []}

# answer takes the grants for a source, destination and protocol (deny, allow
# and dry_run), the path and method (null where there is none), and whether
# there is own Rego.
answer(call) := {
	"allow": reason == "ALLOWED",
	"reason": reason,
	"rule_id": rule_id,
	"dry_run": dry_run(call),
} if {
	[reason, rule_id] := verdict(call)
}

# The order says what wins: deny over allow over the default, which denies;
# among denials by default the nearest miss.
verdict(call) := ["DENY_RULE", min(denying)] if {
	count(call.deny) > 0
	denying := [grant.id | some grant in call.deny; matches(grant, call)]
	count(denying) > 0
} else := ["ERROR", "rego:deny"] if {
	call.rego
	malformed_deny
} else := ["DENY_RULE", "rego:deny"] if {
	call.rego
	rego_denies
} else := ["ERROR", "rego:allow"] if {
	call.rego
	malformed_allow
} else := ["ALLOWED", min(allowing)] if {
	allowing := [grant.id | some grant in call.allow; matches(grant, call)]
	count(allowing) > 0
} else := ["ALLOWED", "rego:allow"] if {
	call.rego
	rego_allows
} else := ["METHOD", ""] if {
	some grant in call.allow
	path_fits(grant, call.path)
	live(grant)
} else := ["PATH", ""] if {
	some grant in call.allow
	live(grant)
} else := ["NO_GRANT", ""]

dry_run(call) := [] if {
	call.dry_run == []
} else := sort({grant.id |
	some grant in call.dry_run
	matches(grant, call)
})

matches(grant, call) if {
	path_fits(grant, call.path)
	method_fits(grant, call.method)
	live(grant)
}

live(grant) if not grant.expires_ns

live(grant) if time.now_ns() < grant.expires_ns

method_fits(grant, _) if not grant.methods

method_fits(grant, method) if grant.methods[method]

path_fits(grant, path) if grant.exact[path]

path_fits(grant, path) if {
	grant.any
	path != null
}

path_fits(grant, path) if {
	some prefix in grant.below
	startswith(path, prefix)
	path != prefix
}

path_fits(grant, path) if {
	some template in grant.templates
	parts := split(path, "/")
	length_fits(template, parts)
	every pair in template.fixed { parts[pair[0]] == pair[1] }
	every i in template.free { parts[i] != "" }
}

length_fits(template, parts) if {
	not template.more
	count(parts) == template.parts
}

length_fits(template, parts) if {
	template.more
	parts[template.parts] != ""
}

# What the call is.

default source := ""

source := input.attributes.source.principal if is_string(input.attributes.source.principal)

default destination := ""

destination := input.attributes.destination.principal if is_string(input.attributes.destination.principal)

http := input.attributes.request.http

default protocol := "tcp"

protocol := input.protocol if {
	input.protocol
} else := "http" if {
	http
}

# The query is no part of the path.
request_path := split(http.path, "?")[0] if {
	contains(http.path, "?")
} else := http.path

rpc := parts if {
	parts := split(request_path, "/")
	count(parts) == 3
	parts[0] == ""
	parts[1] != ""
	parts[2] != ""
}

default path := null

path := request_path if protocol == "http"

path := rpc[1] if protocol == "grpc"

path := "" if protocol == "tcp"

default method := null

method := http.method if protocol == "http"

method := rpc[2] if protocol == "grpc"

# Ambiguous paths: servers decode and clean them after the decision. The same
# rules as policy.CheckPath.
ambiguous if {
	protocol in {"http", "grpc"}
	not plain_path
}

plain_path if {
	regex.match(`^/(?:[^/\\;%#?\x00-\x1f\x7f-\x{9f}]+/)*(?:[^/\\;%#?\x00-\x1f\x7f-\x{9f}]+)?$`, unescaped)
	not dot_segment
}

# unescaped replaces each acceptable percent-encoding by a letter: ASCII that
# is neither a control character, "/", "\", "%" nor unreserved, and UTF-8.
unescaped := request_path if {
	not contains(request_path, "%")
} else := regex.replace(request_path, `%(?:2[0-46-9a-cA-C]|3[a-fA-F]|40|5[bdeBDE]|60|7[b-dB-D]|[cC]2%[abAB][0-9a-fA-F]|(?:[cC][3-9a-fA-F]|[dD][0-9a-fA-F])%[89abAB][0-9a-fA-F]|[eE]0%[abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[eE][1-9a-cA-CefEF]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[eE][dD]%[89][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF]0%[9abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF][1-3]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF]4%8[0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F])`, "x")

dot_segment if {
	contains(request_path, "/.")
	regex.match(`/\.\.?(?:/|$)`, request_path)
}

# The grants for this source, destination and protocol.

leaves := [leaf |
	some to in candidates(destination, data.merlon.depths.to)
	some from in candidates(source, data.merlon.depths.from)
	leaf := data.merlon.index[to][from][protocol]
]

# candidates lists the index keys that an ID can stand under: itself, its
# trust domain, any, and "…/*" for each depth at which there are such patterns.
candidates(id, depths) := array.concat([id, trust_domain, "*"], below) if {
	parts := split(id, "/")
	trust_domain := concat("/", array.slice(parts, 0, 3))
	below := [concat("/", array.concat(array.slice(parts, 0, depth), ["*"])) |
		some depth in depths
		depth < count(parts)
	]
}

# The policy's own Rego. Anything but a boolean (for allow also the object of
# opa-envoy-plugin with a boolean "allowed") is an error, which denies.

rego_denies if same(data.authz.deny, true)

rego_denies if same(data.envoy.authz.deny, true)

malformed_deny if not_boolean(data.authz.deny)

malformed_deny if not_boolean(data.envoy.authz.deny)

rego_allows if same(data.authz.allow, true)

rego_allows if same(data.envoy.authz.allow, true)

rego_allows if allowed(data.authz.allow)

rego_allows if allowed(data.envoy.authz.allow)

malformed_allow if unclear(data.authz.allow)

malformed_allow if unclear(data.envoy.authz.allow)

# These take any type, so that a policy whose answer is no boolean compiles,
# and is found out when it answers.
not_boolean(answer) if not is_boolean(answer)

same(a, b) if a == b

allowed(answer) if answer.allowed == true

unclear(answer) if not clear(answer)

clear(answer) if is_boolean(answer)

clear(answer) if is_boolean(answer.allowed)
