"""The English words in which refusals are made, and those with which sentences begin that instruct."""

from __future__ import annotations

import re

META = {
    "you": "you your yours yourself",
    "abstract": (
        "*tion *sion *ness *ity *ance *ence *ism *ship *tions *ities *ences behavio* attitude* practice* message* "
        "reason* way ways choice* matter* kind* form* problem*"
    ),
    "self": "i me my mine myself we our us ours i'm i'd i'll i've we're",
    "machine": (
        "ai assistant assistants bot chatbot program software machine model developers creators operator virtual "
        "chat text-based algorithm"
    ),
    "asked": (
        "request requests requested question questions message prompt topic topics subject subjects matter matters "
        "ask asked asking query theme conversation such area issue"
    ),
    "negation": (
        "not no nothing nobody none never nor neither without cannot can't won't don't doesn't isn't aren't wasn't "
        "wouldn't couldn't shouldn't unable impossible nope haven't hasn't didn't ain't"
    ),
    "turning_down": (
        "declin* refus* refrain* withh* silent silence neutral stop* leav* avoid* reject* denied deny block* "
        "limit* restrict* bound rule* polic* guideline* terms permit* allow* prohibit* forbid* prevent* boundar* "
        "uncomfortable uneasy comfortable careful caution* hesita* pass skip unanswered elsewhere unfortunately "
        "regret* afraid comply* fulfil* condon* encourag* endors* promot* facilitat* disclos* participat* "
        "contribut* engag* assist* support* provid* offer* information instructions guidance advice advise line "
        "refused withdrawn decline turned ended blocked switched keep clear unsafe grant* remain remains hold "
        "spare sooner reserv* pause serious* draw sensitive off-limits limits flag* judge judging sealed side "
        "further subjective steer dive touch entertain* indulge oblige* shy staying sit unable aside out-of-place "
        "error* reply"
    ),
    "morals": (
        "illegal* crime* criminal* unlawful law laws legal* punish* prison* ethic* unethic* moral* immoral* "
        "respect* disrespect* dignity compassion* kindness kind empath* integrity honest* dishonest* responsib* "
        "irresponsib* reckless* rights harm* violen* danger* hurt* safety safe abus* threat* endanger* injur* "
        "suffer* cruel* victim* risk* bully* trauma* aggress* discriminat* stereotyp* hate hatred racis* sexis* "
        "prejudice* offens* offend* inclusi* equal* marginali* society privacy private consent consequence* "
        "violat* decei* decepti* misus* exploit* serious* healthy unhealthy inappropriate appropriate unacceptable "
        "acceptable sensitive grave offence community communities values vulnerable potentially humiliat* shame* "
        "innocent wellbeing well-being unsafe toxic hurtful circumstances norm* humane justice unjust decency "
        "decent civil peaceful life lives living animals planet earth pain painful fear tragic addict* substance* "
        "alcohol smoking disease distress confidential personal shaming truth trust* erode* lasting grief tempt* "
        "glorif* normali* tasteless secrecy honesty negativity anger angry ruin* scar* force felony intrusive "
        "careless carelessly constructive destructive taboo sacred faith* gravest wound* inflict* insecur* "
        "body-shaming lightly hearted harmless licensed supervision tolerance solidarity racial gender reputation* "
        "feelings misunderst*"
    ),
    "norms": (
        "should shouldn't ought must deserve* wrong fair unfair okay ok justif* never nobody anyone anybody "
        "everyone everybody others human humans beings creature* feelings peace* gentl* another's somebody someone "
        "any whatever reason reasons always remember important reflect* mindful consider* reconsider* urge* wish "
        "valued value caring care better best instead gently invite hope believe think nothing no-one precious "
        "beautiful ourselves themselves together both each truly never-ending right simply"
    ),
    "helpers": (
        "contact* call calls doctor* hotline* helpline* lifeline crisis emergency professional* therap* counsel* "
        "police authorit* lawyer* specialist* expert* support* resources trusted trust alone reach* talk* speak* "
        "listen* seek* consult* medical mental health friend* family local nearest available organization*"
    ),
    "deeds": (
        "kill* murder* attack* steal* stole theft* thief rob* cheat* weapon* stab* shoot* shot gun* firearm* bomb* "
        "explosi* poison* drug* burn* destroy* destruct* vandal* hack* fraud* fake* lie lying deceiv* stalk* spy* "
        "beat* whip* choke* strangl* trap* execut* smash* crush* blow* hit* punch* slap* fight* war mock* insult* "
        "ridicul* roast* gossip* trick* prank* brutal* trespass* poach* forg* break*"
    ),
    "offers": (
        "instead else other another different rather happy glad love suggest* perhaps maybe would could please "
        "feel free hope understand* thanks thank sorry appreciate welcome interested hobb* let's shall apologi* "
        "know like today positive cheerful help happy"
    ),
    "scope": (
        "outside beyond scope only handle* deal* colleague* department desk service* set made designed built "
        "trained programmed purpose job role task* capabilit* abilit* able access hands eyes body connect* tools "
        "camera range website* here remit help physical* exist* way means helper team office line chat window "
        "reserved site arms mouth ears knowledge know requires require sensors physical world text alas catalogue "
        "menu practice opening tariff* parcel* appointment* tracking lacks lack neither reach devices hooked "
        "linked sounds sound real-time live browse internet neighbour yourself"
    ),
}

INSTRUCTS = re.compile(
    r"\W*(?:\d+[.)] ?\W*)?(?:first(?:ly)?,? |then,? |next,? |after that,? |finally,? |now |also |and |just |simply "
    r"|so |start by |begin by |always |never |once [^,]{3,40}, |if [^,]{3,60}, |when [^,]{3,40}, )?"
    r"(?:adjust|allow|arrange|assemble|blot|calculate|carve|chill|coat|copy|count|dab|delete|distract|dip|enter"
    r"|freeze|gather"
    r"|get (?:a|an|some|your|the|them|yourself)|have (?:a|an|your|someone|somebody|them|him|her)|hang|include|insert"
    r"|label|learn"
    r"|log|lock|note|offer (?:a|them|him|her)|paste|point|polish|print|review|save|scan|scrub|search|sign|sketch"
    r"|skip|slip|sort"
    r"|split|stretch|subtract|swap|thank|throw|toss|tuck|unplug|update|visit|vacuum|wear|wipe|zoom|add|apply|aim"
    r"|attach|avoid|bake|beat|blend|book|boil|bring|brush|build|buy|bend|change|check|choose|chop"
    r"|clean|click|close|combine|compare|connect|cook|cover|crack|crush|cut|dig|divide|do|don't|download"
    r"|drain|drill|drive|drop|dry|empty|expose|fill|find|fold|follow|give|go|grab|grate|heat|hit|hold|install|keep"
    r"|lay|leave|let|lift|line|load|look|lower|make|mark|measure|melt|mix|move|open|paint|peel|pick|pin|place|plan"
    r"|plant|play|poke|pour|practi[cs]e|press|pull|push|put|raise|read|reduce|remove|rent|repeat|replace|rest|rinse"
    r"|roast|roll|rub|run|sand|save|scrape|screw|season|select|send|serve|set|shake|shoot|sit|slice|slide|soak|spray"
    r"|spread|sprinkle"
    r"|squeeze|stack|stand|steam|stick|stir|store|switch|take|tap|tape|tie|tighten|trim|try|turn|twist|type|use|wait"
    r"|walk|warm|wash|watch|water|weigh|whisk|wipe|work|wrap|write)\b(?! (?:care|part|a (?:moment|deep|break)|safe"
    r"|in mind|that in|away from|is\b|are\b|was\b))"
)
