// What an Envoy asks about: which part of its request is believed, and what in it
// the agent does not decide about. Absent and unknown things are refused.

package extauthz

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"merlon.dev/policy"
)

// What the configuration of an Envoy says to the agent: context extensions of a
// virtual host or route. Those with the prefix are ours, and others not looked at.
const (
	extensionPrefix   = "merlon."
	protocolExtension = "merlon.protocol"
)

// fault is why a request is refused before any policy is asked.
type fault struct {
	reason policy.Reason
	err    error
}

func misconfigured(format string, args ...any) *fault {
	return &fault{policy.Error, fmt.Errorf(format, args...)}
}

func ambiguous(err error) *fault { return &fault{policy.BadRequest, err} }

// call is what an Envoy asks about.
type call struct {
	in *policy.Input // without Source and Destination
	// forged are the header fields that claim an identity, and all the names that the
	// request has, in lower case.
	forged, names []string
	fault         *fault
}

// read takes a call from a request as far as it can be read; the first thing that is
// wrong with it is its fault.
func read(a *authv3.AttributeContext) call {
	c := call{in: &policy.Input{
		SourceAddress:      addressOf(a.GetSource().GetAddress()),
		DestinationAddress: addressOf(a.GetDestination().GetAddress()),
	}}
	protocol, err := protocolOf(a.GetContextExtensions())
	c.in.Protocol = protocol
	http := a.GetRequest().GetHttp()
	c.in.Method, c.in.Host = http.GetMethod(), http.GetHost()
	c.in.Path = http.GetPath()
	if protocol != policy.GRPC { // whose servers take all of it for the method
		c.in.Path, c.in.Query, _ = strings.Cut(http.GetPath(), "?")
	}
	switch {
	case err != nil:
		c.fault = err
	case http == nil:
		c.fault = misconfigured("the request is not about HTTP")
	default:
		c.fault = c.headers(http)
	}
	if c.fault == nil {
		c.fault = c.target(http)
	}
	return c
}

// protocolOf reads the configuration of the Envoy. What arrived has no say in it.
func protocolOf(extensions map[string]string) (policy.Protocol, *fault) {
	for name := range extensions {
		if strings.HasPrefix(name, extensionPrefix) && name != protocolExtension {
			return "", misconfigured("context extension %.100q is not known", name)
		}
	}
	switch p := policy.Protocol(extensions[protocolExtension]); p {
	case policy.HTTP, policy.GRPC:
		return p, nil
	case "":
		return "", misconfigured("context extension %s is missing", protocolExtension)
	default:
		return "", misconfigured("context extension %s is %.100q, neither http nor grpc", protocolExtension, p)
	}
}

// target says what is wrong with method, path and host.
func (c *call) target(http *authv3.AttributeContext_HttpRequest) *fault {
	if err := c.checkTarget(http); err != nil {
		return ambiguous(err)
	}
	for _, s := range []string{c.in.Method, c.in.Path, c.in.Query, c.in.Host} {
		if !utf8.ValidString(s) { // not reached: protobuf refuses them
			return ambiguous(errors.New("the request target is not UTF-8"))
		}
	}
	return nil
}

func (c *call) checkTarget(http *authv3.AttributeContext_HttpRequest) error {
	if err := policy.CheckPath(c.in.Path); err != nil {
		return err // also absolute-form and "*"
	}
	switch {
	case c.in.Method == "":
		return errors.New("the request has no method")
	case c.in.Method == "CONNECT":
		return errors.New("CONNECT would open a tunnel past the policy") // T18
	case strings.Contains(c.in.Query, "#"), http.GetFragment() != "":
		return errors.New("the request target has a fragment")
	case http.GetQuery() != "":
		return errors.New("the request has a query beside its path")
	case c.in.Protocol != policy.GRPC:
		_, err := url.ParseRequestURI(http.GetPath())
		return err
	case c.in.Method != "POST":
		return errors.New("a gRPC call is a POST")
	}
	if _, _, ok := policy.SplitRPC(c.in.Path); !ok {
		return errors.New("a gRPC path is /package.Service/Method")
	}
	return nil
}

// headers takes the header fields. An Envoy that leaves some of them out would have
// the policy decide about another request than it forwards, and sends no pseudo
// fields either.
func (c *call) headers(http *authv3.AttributeContext_HttpRequest) *fault {
	plain, raw := http.GetHeaders(), http.GetHeaderMap().GetHeaders()
	if len(plain) > 0 && len(raw) > 0 {
		return misconfigured("the request has its header fields twice")
	}
	pseudo := make(map[string]string, 4)
	fields := make(policy.HeaderMap, len(plain)+len(raw))
	c.in.Headers = fields
	for name, value := range plain {
		if err := c.header(pseudo, fields, name, value); err != nil {
			return ambiguous(err)
		}
	}
	for _, h := range raw {
		value := h.GetValue()
		if len(h.GetRawValue()) > 0 {
			value = string(h.GetRawValue())
		}
		if err := c.header(pseudo, fields, h.GetKey(), value); err != nil {
			return ambiguous(err)
		}
	}
	if pseudo[":path"] != http.GetPath() || pseudo[":method"] != http.GetMethod() {
		return misconfigured("the request does not have all header fields: the filter picks them (allowed_headers, disallowed_headers)")
	}
	return nil
}

func (c *call) header(pseudo map[string]string, fields policy.HeaderMap, name, value string) error {
	if !utf8.ValidString(value) || !utf8.ValidString(name) {
		// The policy must not see anything else than the server behind does.
		return fmt.Errorf("header field %.100q is not UTF-8", name)
	}
	name = strings.ToLower(name)
	switch {
	case strings.HasPrefix(name, ":"):
		pseudo[name] = value
		return nil
	case policy.ClaimsIdentity(name): // only TLS says who the caller is (T13)
		c.forged = append(c.forged, name)
		return nil
	}
	c.names = append(c.names, name)
	fields[name] = append(fields[name], value)
	return nil
}

// addressOf is "ip:port", or empty for what is no such address.
func addressOf(a *corev3.Address) string {
	socket := a.GetSocketAddress()
	if socket == nil {
		return ""
	}
	return net.JoinHostPort(socket.GetAddress(), strconv.FormatUint(uint64(socket.GetPortValue()), 10))
}
