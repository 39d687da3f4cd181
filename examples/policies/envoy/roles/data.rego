# Who has which role, and what a role may do.
package envoy.authz.roles

members := {
	"spiffe://shop.test/web": ["reader", "buyer"],
	"spiffe://shop.test/report": ["reader"],
	"spiffe://shop.test/admin": ["admin"],
}

permissions := {
	"reader": [{"method": "GET", "path": "orders"}, {"method": "GET", "path": "catalogue"}],
	"buyer": [{"method": "POST", "path": "orders"}],
	"admin": [
		{"method": "GET", "path": "orders"},
		{"method": "DELETE", "path": "orders"},
		{"method": "PUT", "path": "catalogue"},
	],
}
