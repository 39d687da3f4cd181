# Roles from data: a caller may do what one of its roles may.
package envoy.authz

import data.envoy.authz.roles

default allow := false

allow if {
	some role in roles.members[input.attributes.source.principal]
	some permission in roles.permissions[role]
	permission.method == input.attributes.request.http.method
	permission.path == input.parsed_path[0]
}
