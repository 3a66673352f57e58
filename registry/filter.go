// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"ccload/internal/inetdiag"
)

// Filter chooses TCP sockets, in the words of ss(8) and one of our own:
//
//	dst 10.0.0.0/8             the peer's address or prefix; src: the local one
//	dst 10.0.0.1:443           and port; IPv6 in brackets: [2001:db8::1]:443
//	dport = :443               the peer's port; sport: the local one
//	sport >= :1024             = != < > <= >=, or eq ne lt gt le ge
//	state established          also connected, synchronized, all, …; exclude STATE
//	cc cubic                   the congestion control
//	not (A or B) and C         and can be left out; ! & | will do, too
//
// States that follow each other are added up. Where none is named a filter chooses
// what ss does: connections, neither listening nor closed nor on their way there
// without a socket (time-wait, syn-recv). An IPv4 peer of an IPv6 socket counts as
// IPv4.
type Filter struct {
	root   expr
	stated bool // it says something of states
}

// expr is a part of a filter.
type expr interface {
	match(*inetdiag.Socket) bool
	states() stateSet // no others can match
	String() string   // which reads as one operand where it has to
}

type (
	both     struct{ a, b expr }
	either   struct{ a, b expr }
	negation struct{ x expr }
	stateSet uint32 // bits 1<<TCP_ESTABLISHED … (include/net/tcp_states.h)
	cong     string
	portIs   struct {
		end  end
		op   string // a key of compare
		port uint16
	}
	hostIs struct {
		end    end
		prefix netip.Prefix // not valid: any
		port   int          // -1: any
	}
	anything struct{}
)

// end is an end of a connection.
type end bool

const (
	local  end = false
	remote end = true
)

func (e end) of(s *inetdiag.Socket) netip.AddrPort {
	if e == remote {
		return s.Dst
	}
	return s.Src
}

// words are the filter's for its address and its port.
func (e end) words() (host, port string) {
	if e == remote {
		return "dst", "dport"
	}
	return "src", "sport"
}

// States of sockets as ss(8) names them, and its names for several.
const (
	anyState     stateSet = 1<<12 - 2
	closedState  stateSet = 1 << 7
	listenState  stateSet = 1 << 10
	connected             = anyState &^ (closedState | listenState)
	bucketStates stateSet = 1<<3 | 1<<6 // syn-recv and time-wait: no whole sockets
	unnamed               = connected &^ bucketStates
)

var stateWords = map[string]stateSet{
	"established": 1 << 1, "syn-sent": 1 << 2, "syn-recv": 1 << 3, "fin-wait-1": 1 << 4, "fin-wait-2": 1 << 5,
	"time-wait": 1 << 6, "closed": closedState, "close-wait": 1 << 8, "last-ack": 1 << 9, "listening": listenState,
	"closing": 1 << 11, "all": anyState, "connected": connected, "synchronized": connected &^ (1 << 2),
	"bucket": bucketStates, "big": anyState &^ bucketStates,
}

var compare = map[string]func(a, b uint16) bool{
	"=":  func(a, b uint16) bool { return a == b },
	"!=": func(a, b uint16) bool { return a != b },
	"<":  func(a, b uint16) bool { return a < b },
	">":  func(a, b uint16) bool { return a > b },
	"<=": func(a, b uint16) bool { return a <= b },
	">=": func(a, b uint16) bool { return a >= b },
}

// synonyms are other ways to write an operator.
var synonyms = map[string]string{
	"eq": "=", "==": "=", "ne": "!=", "neq": "!=", "lt": "<", "gt": ">", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=",
	"&": "and", "&&": "and", "|": "or", "||": "or", "!": "not",
}

func (x both) match(s *inetdiag.Socket) bool     { return x.a.match(s) && x.b.match(s) }
func (x either) match(s *inetdiag.Socket) bool   { return x.a.match(s) || x.b.match(s) }
func (x negation) match(s *inetdiag.Socket) bool { return !x.x.match(s) }
func (x stateSet) match(s *inetdiag.Socket) bool { return x>>s.State&1 == 1 }
func (x cong) match(s *inetdiag.Socket) bool     { return string(x) == s.Cong }
func (x portIs) match(s *inetdiag.Socket) bool   { return compare[x.op](x.end.of(s).Port(), x.port) }
func (anything) match(*inetdiag.Socket) bool     { return true }

func (x hostIs) match(s *inetdiag.Socket) bool {
	at := x.end.of(s)
	return (x.port < 0 || int(at.Port()) == x.port) && (!x.prefix.IsValid() || x.prefix.Contains(at.Addr().Unmap()))
}

func (x both) states() stateSet     { return x.a.states() & x.b.states() }
func (x either) states() stateSet   { return x.a.states() | x.b.states() }
func (x stateSet) states() stateSet { return x }
func (cong) states() stateSet       { return anyState }
func (portIs) states() stateSet     { return anyState }
func (hostIs) states() stateSet     { return anyState }
func (anything) states() stateSet   { return anyState }

func (x negation) states() stateSet {
	if s, ok := x.x.(stateSet); ok {
		return anyState &^ s
	}
	return anyState
}

func (x both) String() string   { return operand(x.a) + " and " + operand(x.b) }
func (x either) String() string { return x.a.String() + " or " + x.b.String() }
func (x cong) String() string   { return "cc " + string(x) }
func (anything) String() string { return "" }

func (x negation) String() string {
	if _, ok := x.x.(both); ok {
		return "not (" + x.x.String() + ")"
	}
	return "not " + operand(x.x)
}

// operand is x where "and" or "not" stands beside it.
func operand(x expr) string {
	if _, ok := x.(either); ok {
		return "(" + x.String() + ")"
	}
	return x.String()
}

func (x stateSet) String() string {
	var words []string
	for _, w := range slices.Sorted(maps.Keys(stateWords)) {
		switch set := stateWords[w]; {
		case set == x:
			return "state " + w
		case set&(set-1) == 0 && x&set != 0:
			words = append(words, "state "+w)
		}
	}
	return strings.Join(words, " ")
}

func (x portIs) String() string {
	_, word := x.end.words()
	return fmt.Sprintf("%s %s :%d", word, x.op, x.port)
}

func (x hostIs) String() string {
	host := "*"
	if x.prefix.IsValid() {
		host = x.prefix.String()
		if x.prefix.IsSingleIP() {
			host = x.prefix.Addr().String()
		}
		if x.prefix.Addr().Is6() {
			host = "[" + host + "]"
		}
	}
	if x.port >= 0 {
		host += ":" + strconv.Itoa(x.port)
	}
	word, _ := x.end.words()
	return word + " " + host
}

// String writes the filter so that ParseFilter reads the same.
func (f *Filter) String() string { return f.root.String() }

// states are those that a dump has to show; without are those of a filter that names
// none.
func (f *Filter) states(without stateSet) stateSet {
	switch {
	case f == nil:
		return without
	case !f.stated:
		return without & f.root.states()
	}
	return f.root.states()
}

func (f *Filter) match(s *inetdiag.Socket) bool { return f == nil || f.root.match(s) }

// FilterError says where a filter makes no sense.
type FilterError struct {
	Filter string
	Column int // of the first byte, from 1
	Why    string
}

func (e *FilterError) Error() string {
	return fmt.Sprintf("filter %q: column %d: %s", e.Filter, e.Column, e.Why)
}

// ParseFilter reads a filter; nothing at all chooses every connection. Errors are
// *FilterError.
func ParseFilter(text string) (f *Filter, err error) {
	p := &parser{text: text, tokens: scan(text)}
	defer func() {
		if e, ok := recover().(*FilterError); ok {
			f, err = nil, e
		} else if e != nil {
			panic(e)
		}
	}()
	f = &Filter{root: anything{}}
	if len(p.tokens) > 0 {
		f.root = p.either()
		if t := p.peek(); t.word != "" {
			p.fail(t, "%q is too much", t.word)
		}
	}
	f.stated = p.stated
	return f, nil
}

type token struct {
	word string // "" at the end
	at   int    // byte offset
}

// scan cuts a filter into words and operators.
func scan(text string) (tokens []token) {
	const space, operators = " \t\r\n", "<>=!&|"
	for i := 0; i < len(text); {
		begin := i
		switch {
		case strings.IndexByte(space, text[i]) >= 0:
			i++
			continue
		case text[i] == '(' || text[i] == ')':
			i++
		case strings.IndexByte(operators, text[i]) >= 0:
			i++
			if i < len(text) && (text[i] == '=' && text[begin] != '&' && text[begin] != '|' || text[i] == text[begin] && (text[i] == '&' || text[i] == '|')) {
				i++
			}
		default:
			for i < len(text) && strings.IndexByte(space+operators+"()", text[i]) < 0 {
				i++
			}
		}
		tokens = append(tokens, token{text[begin:i], begin})
	}
	return tokens
}

// parser goes down the grammar; what is wrong it throws to ParseFilter.
type parser struct {
	text   string
	tokens []token
	depth  int
	stated bool
}

// maxDepth is how deep parentheses and negations may be nested.
const maxDepth = 100

func (p *parser) peek() token {
	if len(p.tokens) == 0 {
		return token{at: len(p.text)}
	}
	return p.tokens[0]
}

func (p *parser) next() token {
	t := p.peek()
	if t.word != "" {
		p.tokens = p.tokens[1:]
	}
	return t
}

// is says whether the next token is one of the words, some of which are written in
// other ways, too.
func (p *parser) is(words ...string) bool {
	w := p.peek().word
	if s, ok := synonyms[w]; ok {
		w = s
	}
	return slices.Contains(words, w)
}

func (p *parser) fail(at token, why string, args ...any) {
	panic(&FilterError{p.text, at.at + 1, fmt.Sprintf(why, args...)})
}

func (p *parser) either() expr {
	x := p.both()
	for p.is("or") {
		p.next()
		x = either{x, p.both()}
	}
	return x
}

func (p *parser) both() expr {
	x := p.one()
	for p.peek().word != "" && !p.is("or", ")") {
		if p.is("and") {
			p.next()
		}
		x = both{x, p.one()}
	}
	return x
}

// predicates are what a filter can ask for.
var predicates = []string{"dst", "src", "dport", "sport", "state", "exclude", "cc"}

func (p *parser) one() expr {
	if p.depth++; p.depth > maxDepth {
		p.fail(p.peek(), "nested deeper than %d", maxDepth)
	}
	defer func() { p.depth-- }()
	if p.is("state", "exclude", "excl") {
		return p.stateSet()
	}
	if p.is("not") {
		p.next()
		return negation{p.one()}
	}
	switch t := p.next(); t.word {
	case "(":
		x := p.either()
		if end := p.next(); end.word != ")" {
			p.fail(end, "a ) is missing, for the ( in column %d", t.at+1)
		}
		return x
	case "dst", "src":
		return p.host(end(t.word == "dst"))
	case "dport", "sport":
		return p.port(end(t.word == "dport"))
	case "cc":
		return cong(p.equals().word)
	case "":
		p.fail(t, "something is missing at the end")
	default:
		p.unknown(t, "not a word of filters", predicates)
	}
	return nil
}

func (p *parser) unknown(t token, what string, words []string) {
	if near := Nearest(t.word, words); near != "" {
		p.fail(t, "%q: %s; did you mean %q?", t.word, what, near)
	}
	p.fail(t, "%q: %s, which are %s", t.word, what, strings.Join(words, ", "))
}

// value is a word that is no operator.
func (p *parser) value() token {
	t := p.next()
	if t.word == "" || strings.ContainsAny(t.word, "<>=!&|()") {
		p.fail(t, "a value is missing")
	}
	return t
}

// equals is the value after an equals sign that may be left out.
func (p *parser) equals() token {
	if p.is("=") {
		p.next()
	}
	return p.value()
}

// stateSet reads a run of states: "state" adds, "exclude" takes away.
func (p *parser) stateSet() expr {
	p.stated = true
	first := p.peek()
	var set stateSet
	if first.word != "state" {
		set = anyState
	}
	for p.is("state", "exclude", "excl") {
		verb, t := p.next(), p.value()
		s, ok := stateWords[t.word]
		if !ok {
			p.unknown(t, "not a state", slices.Sorted(maps.Keys(stateWords)))
		}
		if verb.word == "state" {
			set |= s
		} else {
			set &^= s
		}
	}
	if set == 0 {
		p.fail(first, "no state is left")
	}
	return set
}

func (p *parser) port(e end) expr {
	x := portIs{end: e, op: "="}
	if w := p.peek().word; synonyms[w] != "" && compare[synonyms[w]] != nil {
		x.op = synonyms[w]
		p.next()
	} else if compare[w] != nil {
		x.op = w
		p.next()
	}
	t := p.value()
	x.port = p.number(t, strings.TrimPrefix(t.word, ":"))
	return x
}

func (p *parser) number(t token, digits string) uint16 {
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		p.fail(t, "%q: not a port, from 0 to 65535", digits)
	}
	return uint16(n)
}

// host reads ADDRESS[/BITS][:PORT]; the address may be a star.
func (p *parser) host(e end) expr {
	x := hostIs{end: e, port: -1}
	t := p.equals()
	host, port := t.word, ""
	if inside, after, ok := strings.Cut(strings.TrimPrefix(host, "["), "]"); ok && host[0] == '[' {
		bits, colon, ok := strings.Cut(after, ":")
		host = inside + bits
		if ok {
			port = ":" + colon
		}
		if !strings.Contains(inside, ":") || bits != "" && bits[0] != '/' {
			p.fail(t, "%q: not an IPv6 address in brackets", t.word)
		}
	} else if strings.Count(host, ":") == 1 {
		i := strings.IndexByte(host, ':')
		host, port = host[:i], host[i:]
	}
	if port != "" && port != ":*" {
		x.port = int(p.number(t, port[1:]))
	}
	if host == "*" || host == "" {
		return x
	}
	var err error
	if x.prefix, err = netip.ParsePrefix(host); err != nil {
		var addr netip.Addr
		if addr, err = netip.ParseAddr(host); err == nil && addr.Zone() == "" {
			x.prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
	}
	if addr := x.prefix.Addr(); addr.Is4In6() && x.prefix.Bits() >= 96 {
		x.prefix = netip.PrefixFrom(addr.Unmap(), x.prefix.Bits()-96)
	}
	if x.prefix = x.prefix.Masked(); !x.prefix.IsValid() {
		p.fail(t, "%q: not an address or prefix", host)
	}
	return x
}
