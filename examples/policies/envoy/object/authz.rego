# An object says more than yes or no: where to log in, why a method is refused, and
# what the service behind and the caller get with a call that is allowed.
package envoy.authz

default allow := {
	"allowed": false,
	"http_status": 302,
	"headers": {"location": "https://login.shop.test/"},
	"body": "Please log in first.",
}

allow := response if {
	input.attributes.request.http.method == "GET"
	input.parsed_path[0] == "catalogue"
	response := {
		"allowed": true,
		"headers": {"x-policy": "catalogue"},
		"response_headers_to_add": {"cache-control": "private"},
		"request_headers_to_remove": ["x-debug"],
	}
}

allow := response if {
	input.attributes.request.http.method == "POST"
	input.parsed_path[0] == "catalogue"
	response := {
		"allowed": false,
		"http_status": 405,
		"headers": {"allow": "GET, HEAD"},
		"body": "This API is read only.",
	}
}
